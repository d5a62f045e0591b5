"""Law 7 with experts: a run goes on at another number of expert ranks, whose optimizer has other
parts."""

import shutil
from pathlib import Path

import pytest

from tests import training_run
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import EP2, overrides
from tests.distributed.workers import WorkerGroups
from tests.training_run import metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PATIENCE = 400


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out)]


def back_to_first_checkpoint(run: Path, out: Path) -> None:
    """A copy of a run as it was when its first checkpoint had been written."""
    shutil.copytree(run, out)
    first, *later = sorted((out / "checkpoints").glob("step_*"))
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    (out / "checkpoints" / "latest").write_text(first.name + "\n")


def test_runs_go_on_at_another_number_of_expert_ranks(
    models: TinyModels, ranks: WorkerGroups, tmp_path: Path
):
    """Claim: eight steps of rollouts and updates on two expert ranks are those of one rank, and so
    are the steps after a resume at two, at one after two and at two after one (losses to 1e-5)."""
    model = models.experts("student")
    prompts = training_run.write_prompts(tmp_path / "prompts.jsonl")

    def alone(out: Path) -> None:
        jobs.train_run(training_run.overrides(model, prompts, out))

    def shared(out: Path) -> None:
        keys = training_run.overrides(model, prompts, out, *overrides(EP2))
        ranks(2).run(jobs.train_run, overrides=keys, timeout=PATIENCE)

    alone(tmp_path / "one")
    training_run.assert_steps(metrics(tmp_path / "one"))
    expected = pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    shared(tmp_path / "two")
    assert losses(tmp_path / "two") == expected
    for start, go_on in (("two", shared), ("two", alone), ("one", shared)):
        out = tmp_path / f"{start}-{go_on.__name__}"
        back_to_first_checkpoint(tmp_path / start, out)
        go_on(out)
        assert losses(out) == expected
