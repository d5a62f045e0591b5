"""Evaluation of the live student: it finds what the commands find on the step's checkpoint, changes
nothing, goes on after stops and kills, and keeps the best checkpoint.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import in_training
from evaluation.sample import sample
from megatron_opdlm import train
from megatron_opdlm.config import load_config
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError, Stopped
from megatron_opdlm.generator import load_generator
from megatron_opdlm.supervision import preemption
from tests import training_run
from tests.conftest import MASK
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.layouts import overrides as layout_overrides
from tests.distributed.workers import WorkerGroups
from tests.end_to_end import killed
from tests.end_to_end.killed import Kill
from tests.training_run import STEPS, metrics

pytestmark = pytest.mark.distributed

QUESTIONS = ("a", "bc", "1+2=", "xyz?", "0", "what", "k-k", "77")
LIMIT = 10  # response tokens
TARGET = 6  # step whose responses are the right answers
EVALUATED = [0, 3, TARGET, STEPS]


def responses(checkpoint: Path) -> list[dict[str, Any]]:
    """What ``evaluation.sample`` makes of the questions."""
    generator = load_generator(checkpoint, mask_token_id=MASK)
    rows = [{"question": question} for question in QUESTIONS]
    return sample(generator, rows, Decoding(max_new_tokens=LIMIT), "test")


@pytest.fixture(scope="module")
def data(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that only the student of step 6 solves: its own responses are the answers."""
    directory = tmp_path_factory.mktemp("data")
    made = responses(plain / "checkpoints" / f"step_{TARGET:07d}")
    rows = [{"question": row["question"], "answer": row["response"].strip()} for row in made]
    (directory / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def command(model: Path, prompts: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Evaluated at steps 0, 3, 6 and 8; regular checkpoints at 4 and 8, of which one is kept."""
    return training_run.overrides(
        model,
        prompts,
        out,
        "checkpoint.every=4",
        "checkpoint.keep=1",
        "evaluation.every=3",
        "evaluation.tasks=[exact_match:own]",
        f"evaluation.data={data}",
        f"evaluation.max_new_tokens={LIMIT}",
        *more,
    )


@pytest.fixture(scope="module")
def evaluated(
    model: Path, prompts: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "evaluated"
    jobs.train_run(command(model, prompts, data, out))
    return out


def evaluations(out: Path) -> list[dict[str, Any]]:
    """Lines of evaluation.jsonl, without what a clock measured."""
    lines = (out / "evaluation.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def left(out: Path) -> tuple[set[str], str, str]:
    """Names below checkpoints/, and what its pointers name."""
    directory = out / "checkpoints"
    best, latest = ((directory / name).read_text().strip() for name in ("best", "latest"))
    return {path.name for path in directory.iterdir()}, best, latest


def weights(run: Path, step: int) -> jobs.Arrays:
    return jobs.model_weights(run / "checkpoints" / f"step_{step:07d}")


def without_evaluation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("evaluation")} for row in rows]


def test_finds_what_the_commands_find_on_the_checkpoint(evaluated: Path, plain: Path):
    """Claim: the student of step 6, which the answers are of, is right everywhere, in the counts of
    ``evaluation.sample`` on its checkpoint; the others are not."""
    rows = evaluations(evaluated)
    assert [row["step"] for row in rows] == EVALUATED
    scores = {row["step"]: row["score"] for row in rows}
    assert scores[TARGET] == 1.0
    assert all(score < 1 for step, score in scores.items() if step != TARGET)
    made = responses(plain / "checkpoints" / f"step_{TARGET:07d}")
    tokens = sum(len(row["response_ids"]) for row in made)
    found = rows[EVALUATED.index(TARGET)]["tasks"]["exact_match:own"]
    assert found["n"] == len(QUESTIONS)
    assert found["tokens_per_denoising_step"] == tokens / sum(row["passes"] for row in made)
    assert found["tokens_per_forward"] == tokens / sum(row["forwards"] for row in made)


def test_changes_nothing_and_stands_in_its_step_s_line(evaluated: Path, plain: Path):
    """Claim: losses, counts and weights are those of the run without evaluation, bit for bit."""
    rows = metrics(evaluated)
    assert without_evaluation(rows) == metrics(plain)
    expected, found = weights(plain, STEPS), weights(evaluated, STEPS)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    by_step = {row["step"]: row for row in evaluations(evaluated)}
    for row in rows:
        assert ("evaluation" in row) == (row["step"] in EVALUATED)
        if "evaluation" in row:
            assert row["evaluation"] == by_step[row["step"]]["tasks"]
            assert row["evaluation_score"] == by_step[row["step"]]["score"]
    lines = (evaluated / "metrics.jsonl").read_text().splitlines()
    assert ["seconds_evaluation" in json.loads(line) for line in lines] == [
        "evaluation" in row for row in rows
    ]


def test_the_best_checkpoint_is_kept(evaluated: Path, plain: Path):
    """Claim: the best step has a checkpoint although it is no regular one, ``keep`` spares it, and
    those that were best before it are gone."""
    best, last = f"step_{TARGET:07d}", f"step_{STEPS:07d}"
    assert left(evaluated) == ({"best", "latest", best, last}, best, last)
    expected, found = weights(plain, TARGET), weights(evaluated, TARGET)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_killed_in_an_evaluation_and_in_keeping_the_best(
    forks: WorkerGroups, evaluated: Path, model: Path, prompts: Path, data: Path, tmp_path: Path
):
    """Claim: SIGKILL before step 1, while the line is written, while step 6 is evaluated and right
    after its checkpoint is named: the same command ends with the undisturbed run's results."""
    out = tmp_path / "run"
    overrides = command(model, prompts, data, out)
    kills = [
        Kill(function="evaluation.in_training:evaluate", call=1, moment="after"),
        Kill(function="megatron_opdlm.metrics:append_jsonl", call=1, moment="half way"),
        Kill(function="megatron_opdlm.metrics:_amend_last", call=2, moment="after"),
        Kill(function="evaluation.in_training:evaluate", call=2),
        Kill(function="megatron_opdlm.checkpoint:Checkpoints._point_to_best", call=2),
    ]
    for kill in kills:
        (ended,) = forks(1).run(killed.run, overrides=overrides, kill=kill, timeout=240)
        assert ended["code"] == -9, (kill, ended)
    (ended,) = forks(1).run(killed.run, overrides=overrides, kill=None, timeout=240)
    assert ended["code"] == 0, ended
    assert evaluations(out) == evaluations(evaluated)
    assert metrics(out) == metrics(evaluated)
    assert left(out) == left(evaluated)
    assert not list(out.rglob("*tmp*"))


def test_a_request_to_stop_ends_an_evaluation(
    evaluated: Path,
    model: Path,
    prompts: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Claim: asked to stop while step 3's responses are generated, a run saves step 3 and leaves
    without its evaluation; the same command evaluates step 3, and ends like the undisturbed run."""
    out = tmp_path / "run"
    overrides = command(model, prompts, data, out)
    evaluate = in_training.evaluate
    calls = 0

    def asked_to_stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            preemption.request("SIGTERM")
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(in_training, "evaluate", asked_to_stop)
        with preemption.listening(), pytest.raises(Stopped, match="step 3 is saved"):
            train.run(load_config(None, overrides))
    assert [row["step"] for row in evaluations(out)] == [0]
    assert (out / "checkpoints" / "latest").read_text() == "step_0000003\n"
    with preemption.listening():  # the request is forgotten
        train.run(load_config(None, overrides))
    assert evaluations(out) == evaluations(evaluated)
    assert metrics(out) == metrics(evaluated)
    assert left(out) == left(evaluated)


def test_a_finished_run_evaluates_nothing_again_and_may_be_asked_otherwise(
    evaluated: Path, model: Path, prompts: Path, data: Path, tmp_path: Path
):
    """Claim: the same command adds no line; other settings are evaluated once, and their scores are
    compared with their own kind only."""
    out = tmp_path / "run"
    shutil.copytree(evaluated, out)
    train.run(load_config(None, command(model, prompts, data, out)))
    assert evaluations(out) == evaluations(evaluated)
    train.run(load_config(None, command(model, prompts, data, out, "evaluation.limit=1")))
    *before, new = evaluations(out)
    assert before == evaluations(evaluated)
    assert (new["step"], new["settings"]["limit"]) == (STEPS, 1)
    assert new["tasks"]["exact_match:own"]["n"] == 1
    assert left(out)[1] == f"step_{STEPS:07d}"


@pytest.fixture(scope="module")
def short(
    model: Path, prompts: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Evaluations of a run of three steps on one rank."""
    out = tmp_path_factory.mktemp("runs") / "short"
    jobs.train_run(command(model, prompts, data, out, "train.steps=3"))
    return evaluations(out)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2"])
def test_layouts_agree(
    layout: str,
    ranks: WorkerGroups,
    model: Path,
    prompts: Path,
    data: Path,
    tmp_path: Path,
    short: list[dict[str, Any]],
):
    """Claim: the same accuracy and the same counts on two ranks, before and after three steps, with
    the file written once."""
    out = tmp_path / "run"
    keys = layout_overrides(LAYOUTS[layout][1])
    overrides = command(model, prompts, data, out, "train.steps=3", *keys)
    ranks(2).run(jobs.train_run, overrides=overrides, timeout=240)
    assert [row["step"] for row in short] == [0, 3]
    assert evaluations(out) == short


def test_what_cannot_be_evaluated_is_refused_before_anything_is_built(
    model: Path, prompts: Path, data: Path, tmp_path: Path
):
    """Claim: one line with the task and the remedy, and no run directory."""
    cases = {
        "evaluation.tasks=[gsm9k]": "'gsm9k': not known.*did you mean",
        "evaluation.tasks=[addition]": r"addition\.jsonl, which is missing",
        "evaluation.tasks=[livebench]": "LiveBench",
    }
    for override, expected in cases.items():
        out = tmp_path / "run"
        with pytest.raises(InputError, match=expected):
            train.run(load_config(None, command(model, prompts, data, out, override)))
        assert not out.exists()
