"""What the tests of saving make ranks do, as ``jobs`` does: an optimizer whose state is known at
every place, saved and loaded on any number of replicas.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.config import load_config
from megatron_opdlm.model.weights import named_global_parameters
from megatron_opdlm.run import build
from megatron_opdlm.storage.model_state import (
    layout_metadata,
    restore_optimizer,
    training_state,
    weights_state,
)
from megatron_opdlm.storage.optimizer_shards import owned_states
from megatron_opdlm.storage.sharded_load import load
from megatron_opdlm.storage.sharded_save import ShardedSave
from megatron_opdlm.update import Student
from tests.distributed import jobs

NAMES = ("param", "exp_avg", "exp_avg_sq")


def built(overrides: list[str]) -> Student:
    """A student whose optimizer has its state, of no particular values."""
    config = load_config(None, overrides)
    source, _ = build.open_pair(config)
    hardware = jobs.join(build.model_layout(config))
    student = build.build_student(source, config, hardware)
    for optimizer in _optimizers(student):
        optimizer.load_state_dict(optimizer.state_dict())
    return student


def _optimizers(student: Student) -> list[Any]:
    chained: Any = student.optimizer
    return chained.chained_optimizers


def _expected(number: int, name: str, start: int, count: int) -> Tensor:
    """The known state of the ``number``-th parameter, from its ``start``-th value on."""
    base = 1000.0 * number + 100.0 * NAMES.index(name)
    return base + (torch.arange(start, start + count) % 8191) / 8192


@torch.no_grad()
def _known(student: Student, check: Callable[[Tensor, Tensor], object]) -> int:
    """``check(own, expected)`` for all state of this rank; how many numbers it has."""
    numbers = {p: i for i, (_, p) in enumerate(named_global_parameters(student.model))}
    count = 0
    for optimizer in _optimizers(student):
        for owned in owned_states(optimizer):
            for name, values in owned.values.items():
                number = numbers[owned.parameter]
                check(values, _expected(number, name, owned.start, len(values)))
            count += len(owned.values["param"])
    return count


@torch.no_grad()
def _make_known(student: Student) -> int:
    """Give state and weights their known values; how many numbers of the state are this rank's."""
    for number, (_, parameter) in enumerate(named_global_parameters(student.model)):
        parameter.copy_(_expected(number, "param", 0, parameter.numel()).view_as(parameter))
    return _known(student, lambda values, expected: values.copy_(expected))


def _assert_equal(own: Tensor, expected: Tensor) -> None:
    assert torch.equal(own, expected)


def save(overrides: list[str], directory: Path) -> dict[str, int]:
    """Save known state; bytes of the rank's own state, of the whole, and how much more memory the
    save took at its peak.
    """
    student = built(overrides)
    own = _make_known(student)
    if parallel.is_writer():
        directory.mkdir()
    parallel.barrier()
    with _Peak() as peak:
        training = ShardedSave(training_state(student), directory, content=layout_metadata())
        written = training.finish()
    if parallel.is_writer():
        training.write_index(written)
    parallel.barrier()
    whole = sum(parameter.numel() for parameter in student.model.parameters())
    return {"own": 12 * own, "whole": 12 * whole, "peak": peak.bytes}


def read(overrides: list[str], directory: Path) -> dict[str, int]:
    """Load it and compare every number; as ``save``."""
    student = built(overrides)
    with _Peak() as peak:
        loaded = load(training_state(student, is_loading=True), directory)
        restore_optimizer(student, loaded["optimizer"])
    own = _known(student, _assert_equal)
    whole = sum(parameter.numel() for parameter in student.model.parameters())
    return {"own": 12 * own, "whole": 12 * whole, "peak": peak.bytes}


def read_by_megatron(overrides: list[str], directory: Path) -> None:
    """The same through Megatron's own form, which gathers."""
    student = built(overrides)
    metadata = layout_metadata()
    wanted = weights_state(student.model)
    asked = student.optimizer.sharded_state_dict(wanted, is_loading=True, metadata=metadata)
    loaded = load({"model": wanted, "optimizer": asked}, directory)
    student.optimizer.load_state_dict(loaded["optimizer"])
    _known(student, _assert_equal)


def save_by_megatron(overrides: list[str], directory: Path) -> None:
    """Save known state as earlier versions did."""
    student = built(overrides)
    _make_known(student)
    state = weights_state(student.model)
    optimizer = student.optimizer.sharded_state_dict(state, metadata=layout_metadata())
    directory.mkdir()
    made = ShardedSave(
        {"model": state, "optimizer": optimizer}, directory, content=layout_metadata()
    )
    made.write_index(made.finish())


class _Peak:
    """How many bytes more of memory this process took during the body than before it."""

    bytes = 0

    def __enter__(self) -> "_Peak":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is taken
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = _resident("VmHWM") - self._before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
