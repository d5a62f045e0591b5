"""A recipe with ``stages`` through the pipeline: answers, warm-up, then larger blocks."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import pipeline
from launch.pipeline_settings import Settings, read_settings
from launch.stages import ROOT, Stage
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.errors import RunError
from megatron_opdlm.model_files.fingerprint import fingerprint
from tests.conftest import MASK, TinyModels
from tests.end_to_end.test_pipeline import SECONDS
from tests.forking import ForkServer, run_program
from tests.training_run import write_prompts

RECIPE = f"""
base: {ROOT}/configs/tiny_cpu.yaml
train: {{steps: 3}}
data: {{epochs: 9}}
rollout: {{prompts_per_step: 4, max_new_tokens: 8}}
curriculum: {{start: 4, end: 8, steps: 2}}
optimizer: {{batch_size: 2}}
checkpoint: {{every: 1}}
logging: {{tensorboard: false}}
stages:
  - kind: answer
    rollout: {{max_new_tokens: 32}}
  - kind: warm_up
    train: {{steps: 2}}
  - kind: distil
    name: larger
    evaluate: larger.yaml
    rollout: {{block_size: 8, denoising_steps: 8}}
"""
EVALUATION = """
common: {{block_size: {0}, denoising_steps: {0}, max_new_tokens: 8}}
runs:
  - {{name: static, tasks: [exact_match:held_out]}}
"""
NAMES = ["import", "answer", "warm_up", "warm_up: export", "warm_up: evaluate"]
NAMES += ["larger", "larger: export", "larger: evaluate", "tables"]


@pytest.fixture
def arguments(models: TinyModels, tmp_path: Path) -> list[str]:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": text, "answer": "c"} for text in ("ab", "ba", "abc")]
    (data / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, block in (("plain", 4), ("larger", 8)):
        (tmp_path / f"{name}.yaml").write_text(EVALUATION.format(block))
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    hf = models.hf("student", tied=True, layers=2)
    return [
        *(str(tmp_path / "recipe.yaml"), "--hf", str(hf), "--data", str(data)),
        *("--evaluation", str(tmp_path / "plain.yaml"), "--mask-token-id", str(MASK)),
        *("--ranks", "1", f"data.path={prompts}"),
    ]


def settings(arguments: list[str], out: Path, *more: str) -> Settings:
    argv = [*arguments, "--out", str(out), *more]
    return read_settings(pipeline._parser().parse_intermixed_args(argv), {})


def program(stage: Stage) -> list[str]:
    """Module and arguments of a stage's command."""
    words = stage.command()
    return words[words.index("-m") + 1 :] if "-m" in words else words[3:]  # one_node.sh --ranks 1


@pytest.fixture
def run(
    fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[str, list[str]]]]:
    """Commands are forked, not started: names and commands as they are run."""
    done: list[tuple[str, list[str]]] = []

    def forked(stage: Stage, *_: object) -> None:
        words = program(stage)
        if stage.name == "tables":  # evaluation.report draws pictures, which takes seconds
            Path(words[-1]).mkdir()
        else:
            result = fork_server.run(*words)
            assert result.returncode == 0, result.stderr
        done.append((stage.name, words))

    monkeypatch.setattr(pipeline, "_run", forked)
    numbers = signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    yield done
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_stages_go_through(arguments, run, tmp_path):
    """Claim: every stage is run once, in order; the warm-up reads the answers of the imported model
    and draws nothing, the next training goes on with its weights, both under the same teacher; the
    report compares them; nothing is done twice."""
    out = tmp_path / "out"
    chosen = settings(arguments, out)
    pipeline.run_pipeline(chosen)
    assert [name for name, _ in run] == NAMES
    stages = out / "stages"
    answers = stages / "answer" / "answers.jsonl"
    assert all(row["response"] for row in lines_of(answers))
    warm_up, larger = (
        json.loads((stages / name / "run" / "inputs.json").read_text())
        for name in ("warm_up", "larger")
    )
    assert warm_up == {
        "model.path": fingerprint(out / "imported"),
        "data.path": content_hash(answers),
    }
    after = stages / "warm_up" / "run" / "checkpoints" / "step_0000002"
    assert larger["model.path"] == fingerprint(after) != warm_up["model.path"]
    assert larger["teacher.path"] == warm_up["model.path"]
    drawn = [
        row["rollout_tokens"] for row in lines_of(stages / "warm_up" / "run" / "metrics.jsonl")
    ]
    assert drawn == [0, 0]
    assert all(
        row["rollout_tokens"] for row in lines_of(stages / "larger" / "run" / "metrics.jsonl")
    )
    exported = json.loads((stages / "larger" / "exported" / "config.json").read_text())
    assert exported["block_size"] == 8
    table = (out / "report" / "stages.md").read_text()
    assert "answer: " in table and "| warm_up | 4 | forward_kl | 2 |" in table
    assert "| larger | 8 | forward_kl | 3 |" in table
    compared = [f"recipe/{name}={stages / name / 'evaluation'}" for name in ("warm_up", "larger")]
    assert run[-1][1][1:3] == compared
    pipeline.run_pipeline(settings(arguments, out))
    assert len(run) == len(NAMES)


MOMENTS = {  # a stage, and what exists when it is under way
    "answer": "answer/answers.jsonl.part",
    "warm_up": "warm_up/run/checkpoints/step_0000001/manifest.json",
    "larger": "larger/run/checkpoints/step_0000001/manifest.json",
}


@pytest.mark.slow
def test_killed_stages_go_on_bit_for_bit(arguments, run, fork_server, tmp_path, monkeypatch):
    """Claim: answers, losses and responses are those of a path that nothing has disturbed, when
    every stage of the recipe is killed once and the pipeline started again."""
    whole, out, longer = tmp_path / "whole", tmp_path / "out", "train.steps=8"
    pipeline.run_pipeline(settings(arguments, whole, longer))
    undisturbed, killed = pipeline._run, []

    def disturbed(stage: Stage, *rest: Any) -> None:
        if stage.name not in MOMENTS or stage.name in killed:
            return undisturbed(stage, *rest)
        killed.append(stage.name)
        module, *words = program(stage)
        log = tmp_path / f"{stage.name}.log"
        process = fork_server.fork(run_program, output=log, module=module, arguments=words)
        while not (out / "stages" / MOMENTS[stage.name]).exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.005)
        process.signal(signal.SIGKILL)
        assert process.wait(SECONDS) == -signal.SIGKILL
        raise RunError("killed")

    monkeypatch.setattr(pipeline, "_run", disturbed)
    for stage in MOMENTS:
        with pytest.raises(RunError, match="killed"):
            pipeline.run_pipeline(settings(arguments, out, longer))
        assert killed[-1] == stage
    pipeline.run_pipeline(settings(arguments, out, longer))
    assert made(out) == made(whole)


def made(out: Path) -> Any:
    """Everything that the stages made, without clocks and paths."""
    stages = out / "stages"
    losses = [
        (row["step"], row["loss"], row["grad_norm"])
        for name in ("warm_up", "larger")
        for row in lines_of(stages / name / "run" / "metrics.jsonl")
    ]
    predictions = [file.read_text() for file in sorted(stages.rglob("predictions.jsonl"))]
    return (stages / "answer" / "answers.jsonl").read_text(), losses, predictions
