"""What the fault suite shares: jobs that can be disturbed, and a run that nobody disturbed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import training_run
from tests.conftest import TinyModels
from tests.distributed.workers import WorkerGroups
from tests.faults import disturbed
from tests.faults.disturbed import Disturbance, Ended
from tests.faults.refusals import Runner
from tests.forking import free_port


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training command on one or two ranks, which can be disturbed and started again."""

    groups: WorkerGroups
    ranks: int
    arguments: list[str]
    out: Path

    def __call__(
        self, *more: str, disturbance: Disturbance | None = None, **options: Any
    ) -> list[Ended]:
        """How each rank ended."""
        return self.of([*self.arguments, *more], disturbance=disturbance, **options)

    def of(self, arguments: list[str], **options: Any) -> list[Ended]:
        """The same for any command line; ``module`` says of which command."""
        return self.groups(self.ranks).run(
            disturbed.run,
            arguments=arguments,
            logs=self.out.with_name(self.out.name + "-logs"),
            port=free_port() if self.ranks > 1 else 0,
            timeout=disturbed.SECONDS + 60,
            **options,
        )

    def continued(self, *more: str) -> list[dict[str, Any]]:
        """Start again by the same command, to the end; the metrics."""
        ended = self(*more)
        assert all(one.code == 0 for one in ended), [one.log[-3000:] for one in ended]
        training_run.assert_steps(training_run.metrics(self.out))
        return training_run.metrics(self.out)


@pytest.fixture(scope="session")
def fault_model(models: TinyModels) -> Path:
    return models.hf("student", tied=True, layers=2)


@pytest.fixture(scope="session")
def fault_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_run.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture
def job(forks: WorkerGroups, fault_model: Path, fault_prompts: Path, tmp_path: Path):
    """``job(ranks, key=value, ...)``: a run directory of its own."""

    def make(ranks: int, *more: str) -> Job:
        out = tmp_path / "run"
        arguments = training_run.overrides(fault_model, fault_prompts, out, *more)
        return Job(groups=forks, ranks=ranks, arguments=arguments, out=out)

    return make


@pytest.fixture(scope="session")
def undisturbed(
    forks: WorkerGroups,
    fault_model: Path,
    fault_prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """Metrics of a run on two replicas that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    arguments = training_run.overrides(fault_model, fault_prompts, out)
    return Job(groups=forks, ranks=2, arguments=arguments, out=out).continued()


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)
