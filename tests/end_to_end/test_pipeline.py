"""launch/pipeline.sh: from a Hugging Face directory to tables, also when killed in a stage."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launch import pipeline
from megatron_opdlm.errors import InputError
from tests.conftest import MASK, TinyModels
from tests.training_run import write_prompts

ROOT = Path(__file__).parents[2]
SECONDS = 1500  # generous: the machine may be loaded
# A few small steps of the tiny recipe.
KEYS = (
    *("train.steps=4", "checkpoint.every=1", "rollout.prompts_per_step=4", "data.epochs=9"),
    *("optimizer.batch_size=2", "rollout.max_new_tokens=8", "curriculum.start=4"),
    *("curriculum.end=8", "curriculum.steps=2", "logging.tensorboard=false"),
)
# A stage, and what exists when it is under way.
MOMENTS = {
    "import": "pipeline.json",
    "train": "run/checkpoints/step_0000001/manifest.json",
    "export": "trained.json",
    "evaluate": "exported",
    "tables": "evaluation/summary.json",
}


@pytest.fixture(scope="module")
def inputs(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipeline")
    data = root / "data"
    data.mkdir()
    rows = [{"prompt": text, "answer": "c"} for text in ("ab", "ba", "abc")]
    (data / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "hf": models.hf("student", tied=True, layers=2),
        "data": data,
        "prompts": write_prompts(root / "prompts.jsonl"),
    }


def command(inputs: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        str(ROOT / "launch" / "pipeline.sh"),
        "configs/tiny_cpu.yaml",
        *("--hf", str(inputs["hf"]), "--data", str(inputs["data"]), "--out", str(out)),
        *("--mask-token-id", str(MASK), "--ranks", "1"),
        f"data.path={inputs['prompts']}",
        *KEYS,
        *more,
    ]


def start(argv: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(
            argv, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(argv: list[str], log: Path, code: int = 0) -> str:
    process = start(argv, log)
    assert process.wait(SECONDS) == code, log.read_text()
    return log.read_text()


def figures(out: Path) -> Any:
    """Everything that a run of the pipeline measures, without clocks and paths."""
    rows = json.loads((out / "evaluation" / "summary.json").read_text())
    losses = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    predictions = [file.read_text() for file in sorted(out.glob("evaluation/*/predictions.jsonl"))]
    return (
        [{k: v for k, v in row.items() if k not in ("seconds", "settings")} for row in rows],
        [(row["step"], row["loss"], row["grad_norm"]) for row in losses],
        predictions,
    )


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(command(inputs, out), out.parent / "log")
    return out


def test_the_tiny_recipe_goes_through(inputs, undisturbed, tmp_path, monkeypatch):
    """Claim: every stage leaves its output, the tables hold a row a run, nothing is done twice, and
    another command does not continue in the same directory."""
    rows, losses, _ = figures(undisturbed)
    assert [row["task"] for row in rows] == ["exact_match:held_out"] * 3
    assert [step for step, *_ in losses] == [1, 2, 3, 4]
    assert json.loads((undisturbed / "trained.json").read_text()) == {"checkpoint": "step_0000004"}
    assert (undisturbed / "report" / "report.md").is_file()
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    text = finish(command(inputs, undisturbed), tmp_path / "again")
    assert text.count("complete, skipped") == 5
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    lock = undisturbed / ".lock"
    assert {p for p in after if after[p] != before.get(p)} <= {lock}
    in_process(monkeypatch, *command(inputs, undisturbed, "train.seed=1"))
    with pytest.raises(InputError, match=r"configuration, which differs in train\.seed"):
        pipeline.main()


def in_process(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", list(argv))


def test_the_dry_run_writes_nothing(inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    in_process(monkeypatch, *command(inputs, out), "--dry-run")
    pipeline.main()
    text = capsys.readouterr().out
    for part in ("memory of the fullest rank", "dynamic-0.9", "megatron_opdlm.train", "export_hf"):
        assert part in text
    assert not out.exists()


def test_bad_input_is_found_before_anything_runs(inputs, tmp_path, monkeypatch):
    """Claim: and the script says it in one line, with exit code 2."""
    out = tmp_path / "out"
    for change, message in (
        (("--hf", "absent"), "--hf absent: no such directory"),
        (("--evaluation", "absent.yaml"), r"absent\.yaml does not exist"),
    ):
        in_process(monkeypatch, *command(inputs, out), *change)
        with pytest.raises(InputError, match=message):
            pipeline.main()
    text = finish([*command(inputs, out), "train.stepz=1"], tmp_path / "log", code=2)
    assert text.startswith("error: ") and text.count("\n") == 1
    assert "did you mean 'train.steps'" in text and not out.exists()


def kill_in(stage: str, argv: list[str], out: Path, log: Path) -> None:
    """SIGKILL for the pipeline alone, soon after the stage has begun; its children are not ours."""
    process = start(argv, log)
    end = time.monotonic() + SECONDS
    while not (out / MOMENTS[stage]).exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", MOMENTS)
def test_a_kill_in_any_stage_changes_no_figure(stage, inputs, undisturbed, tmp_path):
    """Claim: killed while a stage is under way, the same command gives the same figures; stages
    that were complete are not run again."""
    out, log = tmp_path / "out", tmp_path / "log"
    kill_in(stage, command(inputs, out), out, log)
    text = finish(command(inputs, out), tmp_path / "again")
    assert figures(out) == figures(undisturbed)
    assert text.count("complete, skipped") >= list(MOMENTS).index(stage) - 1


@pytest.mark.slow
def test_a_kill_of_everything_while_training(inputs, undisturbed, tmp_path):
    """Claim: the same when all processes die at once, as with the machine."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(command(inputs, out), log)
    while not (out / MOMENTS["train"]).exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(SECONDS)
    finish(command(inputs, out), tmp_path / "again")
    assert figures(out) == figures(undisturbed)


@pytest.mark.slow
def test_a_stopped_pipeline_says_so(inputs, undisturbed, tmp_path):
    """Claim: SIGTERM stops training after it has saved, code 75, and the same command goes on."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(command(inputs, out), log)
    while not (out / MOMENTS["train"]).exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 75, log.read_text()
    finish(command(inputs, out), tmp_path / "again")
    assert figures(out) == figures(undisturbed)
