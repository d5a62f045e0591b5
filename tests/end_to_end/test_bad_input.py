"""Bad input to train, replay and sample: one ``error:`` line with value, rule and remedy, exit code
2, and nothing half-written. (Model directories: tests/unit/model_files/test_bad_hf_directories.py;
prompts files: tests/unit/test_prompts.py; configuration: tests/unit/test_config.py.)
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation import sample
from megatron_opdlm import replay, train
from megatron_opdlm.errors import command
from tests import training_run
from tests.conftest import MASK
from tests.forking import REPOSITORY
from tests.tiny_models import edit_json, make_qwen3

Main = Callable[[], None]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[Main], tuple[int, str]]:
    """Run a command in this process; its exit code and what it wrote to stderr."""

    def run_command(main: Main) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command(main)
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().err

    return run_command


def assert_refused(outcome: tuple[int, str], *parts: str) -> None:
    """Exit code 2 and exactly one line, which starts with ``error:`` and has all the parts."""
    code, stderr = outcome
    assert code == 2, stderr
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, f"{part!r} is not in {line!r}"


# What is added to a good command line -> what the error line must hold.
TRAIN: dict[str, tuple[list[str], list[str]]] = {
    "no such model": (["model.path=/nowhere"], ["model.path=/nowhere", "give"]),
    "no model named": (["model.path="], ["model.path"]),
    "no such teacher": (["teacher.path=/nowhere"], ["teacher.path=/nowhere", "give"]),
    "key that does not exist": (["optimizer.larning=1"], ["optimizer.larning", "did you mean"]),
    "value of the wrong type": (["optimizer.lr=fast"], ["optimizer.lr", "number"]),
    "no room for the mask": (["model.mask_token_id=null"], ["151669", "vocab_size=67", "e.g."]),
    "mask is a letter": (["model.mask_token_id=30"], ["ordinary token", "30", "use"]),
    "mask outside the vocabulary": (["model.mask_token_id=67"], ["67", "vocab_size=67"]),
    "more ranks than were started": (["model.tensor_parallel=2"], ["1 ranks", "2", "start"]),
    "no such prompts": (["data.path=/nowhere.jsonl"], ["data.path=/nowhere.jsonl"]),
    "every prompt too long": (["model.max_positions=5"], ["all 13 prompts", "1 tokens", "shorter"]),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train(run: Any, model: Path, prompts: Path, tmp_path: Path, case: str):
    changes, parts = TRAIN[case]
    out = tmp_path / "run"
    arguments = [*training_run.overrides(model, prompts, out), *changes]
    if case == "every prompt too long":
        rows = [{"prompt_ids": [1] * (2 + i)} for i in range(13)]
        long = tmp_path / "long.jsonl"
        long.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments.append(f"data.path={long}")
    assert_refused(run(lambda: train.main(arguments)), *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("layout", "world_size", "parts"),
    [
        (["tensor_parallel=4"], 4, ["tensor_parallel=4", "num_query_groups=2", "use 1 or 2"]),
        (["pipeline_parallel=3"], 3, ["pipeline_parallel=3", "num_layers=2", "use 1 or 2"]),
        (["tensor_parallel=2"], 3, ["3 ranks", "tensor_parallel=2", "multiple of 2"]),
        (["sequence_parallel=true"], 1, ["sequence_parallel=true", "tensor_parallel=1"]),
        (["context_parallel=3"], 3, ["context_parallel=3", "4 attention heads", "use 1, 2 or 4"]),
        (["context_parallel=2"], 3, ["3 ranks", "context_parallel=2", "multiple of 2"]),
    ],
    ids=["heads", "layers", "ranks", "sequence", "context heads", "context ranks"],
)
def test_layouts_that_do_not_divide(
    run: Any,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    layout: list[str],
    world_size: int,
    parts: Any,
):
    """Claim: a dry run on one machine finds what the run on many would."""
    keys = [f"model.{key}" for key in layout]
    arguments = training_run.overrides(model, prompts, tmp_path / "run", *keys)
    dry = [*arguments, "--dry-run", "--world-size", str(world_size)]
    assert_refused(run(lambda: train.main(dry)), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["evaluation.tasks=[GSMK]"], ["evaluation.tasks: task 'GSMK'", "did you mean"]),
        (["rollout.kv_cache_tokens=8"], ["kv_cache_tokens=8", "16 positions", "raise it"]),
        (["data.path=ROWS"], ["data.path=", "line 2: the model has no tokenizer", "prompt_ids"]),
    ],
    ids=["task", "cache", "tokenizer"],
)
def test_what_a_dry_run_finds_too(
    run: Any, prompts: Path, tmp_path: Path, changes: list[str], parts: Any, flags: list[str]
):
    """Claim: a mistyped task, without its data; a cache that is too small only for later steps;
    and a row of text for a model without a tokenizer."""
    bare = make_qwen3(tmp_path / "bare", tied=True, seed=1, layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [1]}\n{"question": "a"}\n')
    changes = [change.replace("ROWS", str(rows)) for change in changes]
    given = training_run.overrides(bare, prompts, tmp_path / "run", "evaluation.data=/nowhere")
    assert_refused(run(lambda: train.main([*given, *changes, *flags])), *parts)
    assert not (tmp_path / "run").exists()


def test_teacher_with_other_tokens(run: Any, model: Path, prompts: Path, tmp_path: Path):
    larger = make_qwen3(tmp_path / "larger", tied=True, seed=1, vocab=69, layers=2)
    arguments = training_run.overrides(model, prompts, tmp_path / "run", f"teacher.path={larger}")
    outcome = run(lambda: train.main(arguments))
    assert_refused(outcome, "vocab_size=69", "has 67", "use a teacher")


def test_model_of_another_architecture(run: Any, prompts: Path, tmp_path: Path):
    other = make_qwen3(tmp_path / "gpt2", tied=True, seed=1, layers=2)
    edit_json(other / "config.json", model_type="gpt2")
    arguments = training_run.overrides(other, prompts, tmp_path / "run")
    assert_refused(run(lambda: train.main(arguments)), "'gpt2'", "qwen3")


def test_truncated_weights(run: Any, prompts: Path, tmp_path: Path):
    cut = make_qwen3(tmp_path / "cut", tied=True, seed=1, layers=2)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = training_run.overrides(cut, prompts, tmp_path / "run")
    assert_refused(run(lambda: train.main(arguments)), "model.safetensors")
    assert not (tmp_path / "run").exists()


def test_output_directory_with_something_else(run: Any, model: Path, prompts: Path, tmp_path: Path):
    """Claim: nothing of ours is written beside the files of others, nor over a file."""
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.tex").write_text("do not touch")
    arguments = training_run.overrides(model, prompts, mine)
    assert_refused(run(lambda: train.main(arguments)), str(mine), "choose another directory")
    assert [f.name for f in mine.iterdir()] == ["chapter.tex"]
    file = tmp_path / "file"
    file.write_text("x")
    arguments = training_run.overrides(model, prompts, file)
    assert_refused(run(lambda: train.main(arguments)), "is a file", "choose another")


def test_long_prompts_are_skipped_counted_and_reported(run: Any, model: Path, tmp_path: Path):
    """Claim: a prompt beyond the model's limit is left out, said so, and its neighbours keep their
    place in the file."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt_ids": [7, 7, 7]}, {"prompt_ids": [8] * 30}, {"prompt_ids": [9] * 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    keys = [
        "model.max_positions=24",
        "train.steps=1",
        "rollout.prompts_per_step=2",
        "logging.samples=9",
        "data.shuffle=false",
    ]
    code, stderr = run(lambda: train.main(training_run.overrides(model, path, out, *keys)))
    assert code == 0, stderr
    assert "prompts: 2 usable, 1 skipped" in stderr
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(s["index"], s["prompt_ids"]) for s in samples] == [(0, [7] * 3), (2, [9] * 5)]


GOOD_ROW = {"prompt_ids": [1, 2, 3], "response_ids": [4, 5], "masked": [1, 0]}
ROWS: dict[str, tuple[str, list[str]]] = {
    "not JSON": ("{", ["line 2", "JSON"]),
    "not an object": ("[1]", ["line 2", "object"]),
    "missing key": (json.dumps({"prompt_ids": [1], "response_ids": [2]}), ["line 2", "masked"]),
    "lengths differ": (json.dumps(GOOD_ROW | {"masked": [1]}), ["line 2", "1 entries", "2"]),
    "mask that is no bit": (
        json.dumps(GOOD_ROW | {"masked": [2, 0]}),
        ["line 2", "masked holds 2"],
    ),
    "id outside": (json.dumps(GOOD_ROW | {"response_ids": [4, 67]}), ["67", "0 to 66"]),
    "id that is no number": (json.dumps(GOOD_ROW | {"prompt_ids": ["a"]}), ["line 2", "'a'"]),
    "empty prompt": (json.dumps(GOOD_ROW | {"prompt_ids": []}), ["prompt_ids is empty"]),
    "too long": (json.dumps(GOOD_ROW | {"prompt_ids": [1] * 512}), ["514", "512 positions"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_replay_of_malformed_states(run: Any, model: Path, tmp_path: Path, case: str):
    """Claim: the first bad line is named; no result is written."""
    line, parts = ROWS[case]
    path = tmp_path / "states.jsonl"
    path.write_text(json.dumps(GOOD_ROW) + "\n" + line + "\n")
    assert_refused(run(lambda: replay.main(replay_arguments(model, path))), *parts)
    assert [f.name for f in tmp_path.iterdir()] == ["states.jsonl"]


def replay_arguments(model: Path, states: Path) -> list[str]:
    flags = {"--student": model, "--teacher": model, "--trajectories": states}
    flags["--out"] = states.with_name("result.json")
    named = [text for flag, value in flags.items() for text in (flag, str(value))]
    return [*named, f"model.mask_token_id={MASK}"]


def test_replay_without_input_or_with_a_directory_as_output(run: Any, model: Path, tmp_path: Path):
    empty = tmp_path / "states.jsonl"
    empty.write_text("")
    arguments = replay_arguments(model, empty)
    assert_refused(run(lambda: replay.main(arguments)), str(empty), "no rows")
    missing = replay_arguments(model, tmp_path / "nothing.jsonl")
    assert_refused(run(lambda: replay.main(missing)), "nothing.jsonl", "no such file")
    (tmp_path / "result.json").mkdir()
    assert_refused(run(lambda: replay.main(arguments)), "result.json", "is a directory")
    assert_refused(run(lambda: replay.main(arguments[2:])), "--student")


def sample_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Main:
    def main() -> None:
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        sample.main()

    return main


def test_sample(run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Claim: every refusal leaves no output; a good command then writes one row a prompt."""
    rows = tmp_path / "prompts.jsonl"
    out = tmp_path / "out.jsonl"
    rows.write_text('{"prompt_ids": [1, 2, 3]}\n{"prompt_ids": [4]}\n')
    good = ["--model", model, "--prompts", rows, "--out", out, "--max-new-tokens", 5]
    mask = ["--mask-token-id", MASK]
    for more, parts in [
        ([*mask, "--tp", "2"], ["--tp 2", "start a multiple of 2"]),
        ([], ["151669", "vocab_size=67"]),
        ([*mask, "--temperature", "-1"], ["temperature"]),
        ([*mask, "--threshold", "2"], ["threshold", "1"]),
        ([*mask, "--remasking", "random"], ["remasking"]),
        ([*mask, "--prompts", tmp_path / "none.jsonl"], ["none.jsonl"]),
        ([*mask, "--model", tmp_path], [str(tmp_path)]),
    ]:
        assert_refused(run(sample_main(monkeypatch, *good, *more)), *parts)
        assert not out.exists()
    for line, parts in [
        ('{"prompt_ids": [1, 67]}', ["67"]),
        (json.dumps({"prompt_ids": [1] * 512}), ["512"]),
        ('{"answer": 1}', ["prompt_ids"]),
    ]:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"prompt_ids": [1]}\n' + line + "\n")
        main = sample_main(monkeypatch, *good, *mask, "--prompts", bad)
        assert_refused(run(main), *parts)
        assert not out.exists()
    code, stderr = run(sample_main(monkeypatch, *good, *mask, "--margins"))
    assert code == 0, stderr
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt_ids"] for row in written] == [[1, 2, 3], [4]]
    for row in written:
        assert len(row["margins"]) == len(row["response_ids"]) and min(row["margins"]) >= 0
    assert_refused(run(sample_main(monkeypatch, *good, *mask)), "out.jsonl", "exists")


@pytest.mark.distributed
def test_under_a_launcher_one_rank_speaks(model: Path, prompts: Path, tmp_path: Path):
    """Claim: with several ranks the error is still one line, before the launcher's own report, and
    the launcher ends with an error."""
    arguments = training_run.overrides(model, prompts, tmp_path / "run", "optimizer.larning=1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*launcher, "--nproc-per-node=2", "-m", "megatron_opdlm.train", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "optimizer.larning" in lines[0]
    assert ended.stderr.index("error:") < ended.stderr.index("FAILED")
    assert not (tmp_path / "run").exists()
