"""Recorded responses mixed into training: as many as asked for, the same ones after a resume and on
two replicas, and none at fraction 0.
"""

import json
from pathlib import Path

import pytest

from megatron_opdlm.errors import InputError
from tests import training_run
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.layouts import overrides as layout_overrides
from tests.distributed.workers import WorkerGroups
from tests.end_to_end.test_resume import assert_same_steps, cut_back
from tests.training_run import metrics

FALLING = [
    "mixing.fraction=0.8",
    "mixing.end_fraction=0.2",
    "mixing.kind=linear",
    "mixing.steps=6",
    "states.mode=all",
]


@pytest.fixture(scope="module")
def answered(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same prompts with responses, shorter and longer than the length limit."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["response"] = "the answer is "[: 1 + number] + str(number)
    path = tmp_path_factory.mktemp("answered") / "answered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def falling(model: Path, answered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose share of recorded responses falls."""
    out = tmp_path_factory.mktemp("runs") / "falling"
    jobs.train_run(training_run.overrides(model, answered, out, *FALLING))
    training_run.assert_steps(metrics(out))
    return out


def test_the_fraction_is_kept(falling: Path):
    """Claim: of 5 sequences a step those that the schedule asks for, to within one, are recorded,
    the rest is generated, with its own number of states."""
    for row in metrics(falling):
        asked = 5 * (0.8 - 0.6 * min(row["step"] / 6, 1))
        assert abs(row["off_policy_sequences"] - asked) < 1
        generated = 5 - row["off_policy_sequences"]
        assert generated <= row["sequences"] - row["off_policy_sequences"] <= 4 * generated
        assert 0 < row["rollout_tokens"] <= generated * row["max_new_tokens"]


def test_no_fraction_no_difference(model: Path, prompts: Path, answered: Path, tmp_path: Path):
    """Claim: at fraction 0 responses in the file change nothing."""
    runs = []
    for number, file in enumerate((prompts, answered)):
        out = tmp_path / str(number)
        jobs.train_run(training_run.overrides(model, file, out, "train.steps=2"))
        runs.append(metrics(out))
    assert runs[0] == runs[1]
    assert all(row["off_policy_sequences"] == 0 for row in runs[0])


def test_supervised_fine_tuning(model: Path, prompts: Path, answered: Path, tmp_path: Path):
    """Claim: fraction 1 generates nothing; the responses may lie in a second file."""
    losses = []
    for number, keys in enumerate(([answered], [prompts, f"mixing.path={answered}"])):
        out = tmp_path / str(number)
        more = ["mixing.fraction=1", "loss.kind=nll", "curriculum.kind=constant", *keys[1:]]
        command = training_run.overrides(model, Path(keys[0]), out, *more, "train.steps=3")
        jobs.train_run(command)
        rows = metrics(out)
        assert all(row["rollout_tokens"] == 0 for row in rows)
        assert all(row["off_policy_sequences"] == row["sequences"] == 5 for row in rows)
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]  # the same prompts in the same order, here


def test_missing_responses_are_one_line(model: Path, prompts: Path, tmp_path: Path):
    keys = ["mixing.fraction=0", "mixing.end_fraction=0.5", "mixing.kind=linear"]
    with pytest.raises(InputError, match="13 of 13 usable rows have no 'response'"):
        jobs.train_run(training_run.overrides(model, prompts, tmp_path / "run", *keys))
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_resumed_on_two_replicas(
    ranks: WorkerGroups, falling: Path, model: Path, answered: Path, tmp_path: Path
):
    """Claim: which responses are recorded and where they are masked depends neither on a resume nor
    on the layout."""
    number, layout = LAYOUTS["dp2"]
    out = cut_back(falling, tmp_path / "run", 4)
    command = training_run.overrides(model, answered, out, *FALLING)
    ranks(number).run(jobs.train_run, overrides=[*command, *layout_overrides(layout)], timeout=120)
    assert_same_steps(metrics(out), metrics(falling))


def test_resumed_on_one_rank(falling: Path, model: Path, answered: Path, tmp_path: Path):
    """Claim: a resumed run repeats every number exactly."""
    out = cut_back(falling, tmp_path / "run", 6)
    jobs.train_run(training_run.overrides(model, answered, out, *FALLING))
    assert metrics(out) == metrics(falling)
