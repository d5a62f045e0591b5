"""The processes of one conversion: one alone, or those that torchrun started, which share the work.

They only exchange small objects (gloo) and write into one directory that all of them see, so no
model-parallel groups are needed. Torch is imported when a second process takes part.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from megatron_opdlm import launcher
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.writing import new_directory

T = TypeVar("T")
_TIMEOUT = timedelta(
    hours=6
)  # a rank waits while others write; a rank that dies is noticed at once


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process's place among the ``size`` processes of a conversion."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that creates directories, prints and publishes."""
        return self.rank == 0

    def share(self, costs: Sequence[int]) -> range:
        """Which of the items, whose costs are given in order, this process works on: neighbours,
        so that files are read from front to back, and about the same total for everyone.
        """
        return shares(costs, self.size)[self.rank]

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every process. If it fails on one, every process raises: that one its
        own error, the others a RunError that names it.
        """
        if self.size == 1:
            return action()
        result, problem = None, None
        try:
            result = action()
        except Exception as error:  # whatever it was, the others must not wait for this process
            problem = error
        texts = self._gather(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise RunError(f"rank {failed[0][0]} failed ({failed[0][1]}), so nothing was written")
        return result  # pyright: ignore[reportReturnType] -- the action's own

    def on_first(self, action: Callable[[], T]) -> T:
        """Do something on the first process; its result on every one."""
        result = self.together(lambda: action() if self.is_first else None)
        return self._gather(result)[0] if self.size > 1 else result  # pyright: ignore[reportReturnType]

    def join(self) -> None:
        """Form the process group, if there is more than one process."""
        import torch.distributed as dist

        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_TIMEOUT)

    def wait(self) -> None:
        """Until every process is here; nothing to wait for where there is no process group."""
        import torch.distributed as dist

        if self.size > 1 and dist.is_initialized():
            dist.barrier()

    def disband(self) -> None:
        """End the process group; every process is alone from here on, also for whoever asks the
        environment.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
        launcher.forget()

    def _gather(self, value: object) -> list:
        import torch.distributed as dist

        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def from_environment(command: str) -> Team:
    """The team that torchrun describes, or a process alone. Raises InputError where the
    environment describes neither.
    """
    problem = launcher.problem()
    if problem is not None:
        raise InputError(f"{command}: {problem}")
    return Team(rank=launcher.rank(), size=launcher.world_size())


@contextmanager
def shared_directory(out: Path, team: Team) -> Iterator[Path]:
    """``new_directory`` for a team: the first process creates and publishes it, the others write
    into it; after a failure all wait until it is gone. To be entered and left by every process.
    """
    with ExitStack() as stack:
        if team.size > 1:
            stack.callback(team.wait)  # last of all
        yield team.on_first(lambda: stack.enter_context(new_directory(out)))


def shares(costs: Sequence[int], parts: int) -> list[range]:
    """Split items into ``parts`` runs of neighbours of about equal total cost, some maybe empty."""
    total, done = sum(costs), 0
    owners = []
    for cost in costs:
        middle = done + cost / 2
        owners.append(min(int(parts * middle / total), parts - 1) if total else 0)
        done += cost
    bounds = [sum(owner < part for owner in owners) for part in range(parts + 1)]
    return [range(first, stop) for first, stop in itertools.pairwise(bounds)]
