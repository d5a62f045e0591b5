"""Evaluations with the project's engine: the same on every layout, after a kill as without one, and
every task of the registry from its data file to its verdicts.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import run, score
from evaluation.decoding_flags import Loading
from evaluation.tasks import task_names
from megatron_opdlm.diffusion.decoding import Decoding
from tests.conftest import MASK, TinyModels
from tests.distributed.workers import WorkerGroups
from tests.end_to_end import evaluated
from tests.forking import ForkServer

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "evaluation"
PATIENCE = 900  # seconds of a command on a busy machine
DRAWN = Decoding(temperature=1.0, max_new_tokens=9, denoising_steps=2, seed=3)
FLAGS = ["--temperature", "1", "--max-new-tokens", "9", "--denoising-steps", "2", "--seed", "3"]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of every length modulo the block, one of them longer than the model."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": "ab" + "7+=x" * i + "c" * (i % 4), "answer": "4"} for i in range(9)]
    rows.insert(4, {"prompt": "a" * 600, "answer": "4"})
    (folder / "exact_match.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def in_process(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluation.run", *map(str, argv)])
    run.main()


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summary rows without what may differ: times and the layout."""
    kept = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    for row in kept:
        row["settings"] = {k: v for k, v in row["settings"].items() if k not in ("tp", "pp", "ep")}
    return kept


@pytest.mark.parametrize(
    ("name", "layout"),
    [("DP2", Loading(mask_token_id=MASK)), ("TP2", Loading(tp=2, mask_token_id=MASK))],
)
def test_layouts_agree(models: TinyModels, ranks: WorkerGroups, data: Path, name, layout):
    """Claim: summary and predictions, drawn tokens included, are those of one rank."""
    arguments: dict[str, Any] = {
        "model": models.hf("student", tied=True),
        "tasks": ["exact_match"],
        "data": data,
        "decoding": DRAWN,
        "samples": 2,
    }
    expected_summary, expected = evaluated.evaluate(
        loading=Loading(mask_token_id=MASK), **arguments
    )
    first, second = ranks(2).run(evaluated.evaluate, loading=layout, timeout=PATIENCE, **arguments)
    assert first[1] == expected and len(expected) == 10
    assert timeless(first[0]) == timeless(second[0]) == timeless(expected_summary)
    assert expected_summary[0]["prompts_too_long"] == 1


def test_experts_are_shared_out(models: TinyModels, ranks: WorkerGroups, data: Path):
    """Claim: two expert-parallel ranks, and two tensor ranks, give what one rank gives."""
    arguments: dict[str, Any] = {
        "model": models.experts("student"),
        "tasks": ["exact_match"],
        "data": data,
        "decoding": DRAWN,
        "samples": 1,
    }
    _, expected = evaluated.evaluate(loading=Loading(mask_token_id=MASK), **arguments)
    for layout in (Loading(ep=2, mask_token_id=MASK), Loading(tp=2, mask_token_id=MASK)):
        made = ranks(2).run(evaluated.evaluate, loading=layout, timeout=PATIENCE, **arguments)
        assert made[0][1] == expected


def test_killed_on_two_ranks_and_resumed_on_one(
    fork_server: ForkServer,
    models: TinyModels,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Claim: killed by SIGKILL in the middle of a line with two replicas, and
    started again on one rank, an evaluation makes the files of one that was not killed, without
    repeating what was finished."""
    common = ["--model", str(models.hf("student", tied=True)), "--tasks", "exact_match"]
    common += ["--data", str(data), "--mask-token-id", str(MASK), "--samples", "2", *FLAGS]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    in_process(monkeypatch, *common, "--out", whole)
    first, second = fork_server.launch(
        2, "tests.end_to_end.evaluated", 7, *common, "--out", killed, timeout=PATIENCE
    )
    assert first.returncode == -9 and second.returncode != 0
    found = (killed / "predictions.jsonl").read_text()
    assert len(found.splitlines()) == 8 and not found.endswith("\n"), first.stderr
    assert not (killed / "summary.json").exists()
    asked: list[int] = []
    generate = run.TaskRun._generate

    def count(self, task, prompts, done, offset):
        asked.append(len(prompts) * self.samples - len(done))
        generate(self, task, prompts, done, offset)

    monkeypatch.setattr(run.TaskRun, "_generate", count)
    in_process(monkeypatch, *common, "--out", killed)
    assert asked == [20 - 7]
    names = ("predictions.jsonl", "settings.json")
    assert sorted(file.name for file in killed.iterdir()) == [*names, "summary.json"]
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    summaries = [json.loads((out / "summary.json").read_text()) for out in (killed, whole)]
    assert timeless(summaries[0]) == timeless(summaries[1])


def test_every_task(models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Claim: every registered task goes from its data file to a summary row, and evaluation.score
    gives the same verdicts on the written predictions."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for file in FIXTURES.iterdir():
        (data / file.name).symlink_to(file)
    for name in ("addition", "exact_match", "mine"):
        (data / f"{name}.jsonl").write_text('{"question": "2+3=", "answer": "5"}\n')
    names = [name.replace("NAME", "mine") for name in task_names()]
    model = models.hf("student", tied=True)
    common = ["--model", model, "--data", data, "--mask-token-id", MASK, "--limit", "1"]
    in_process(monkeypatch, *common, "--max-new-tokens", "4", "--out", out, "--tasks", *names)
    rows = json.loads((out / "summary.json").read_text())
    assert [row["task"] for row in rows] == names
    graded = [row for row in rows if not row.get("skipped")]
    assert len(graded) > 20 and all(row["n"] == 1 for row in graded)
    predictions = [
        json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()
    ]
    by_task = {row["task"]: row for row in predictions}
    for number, row in enumerate(graded):
        again = tmp_path / f"again{number}"
        task = score.get_task(row["task"])
        score.score(task, data, out / "predictions.jsonl", again)
        [verdict] = map(json.loads, (again / "graded.jsonl").read_text().splitlines())
        assert verdict == {key: by_task[row["task"]][key] for key in verdict}
