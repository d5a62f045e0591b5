"""What the end-to-end tests share: a model, prompts, and one run that they only read."""

from pathlib import Path

import pytest

from tests import training_run
from tests.conftest import TinyModels
from tests.distributed import jobs


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_run.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def model(models: TinyModels) -> Path:
    return models.hf("student", tied=True, layers=2)


@pytest.fixture(scope="session")
def plain(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed and that evaluated nothing, with all its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    jobs.train_run(training_run.overrides(model, prompts, out))
    training_run.assert_steps(training_run.metrics(out))
    return out
