"""The optimizer's state as a checkpoint holds it: beside each weight its float32 value and both
moments, in the weight's shape, so that any layout can read it.

The distributed optimizer gives each replica a run of the flattened weights. A rank writes and reads
just that run, cut into boxes of the weight's shape: no rank ever holds more than its share, and
none asks another. (Megatron's own ``fully_reshardable`` gathers the whole state on every rank; what
it wrote is read here, and it reads what is written here.)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins in a tensor, and its shape

_PREFIX = "optimizer.state"


@dataclass(frozen=True, kw_only=True)
class OwnedState:
    """This rank's run of one parameter's state."""

    parameter: torch.nn.Parameter
    start: int  # of the run in the flattened parameter
    values: dict[str, Tensor]  # "param", "exp_avg", "exp_avg_sq": [n]


def owned_states(optimizer: Any) -> Iterator[OwnedState]:
    """What this rank has of the state of a distributed optimizer: its tensors themselves, or
    float32 copies of those that are kept in 16 bits.
    """
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    values = optimizer._get_main_param_and_optimizer_states(parameter)
                    values = {k: v.detach().float() for k, v in values.items() if k != "step"}
                    start = ranges["param"].start
                    yield OwnedState(parameter=parameter, start=start, values=values)


def sharded(state: OwnedState, place: ShardedTensor | ShardedTensorFactory) -> dict[str, Any]:
    """The run as numbered tensors of a checkpoint, in order. ``place``: the parameter among the
    model's.
    """
    is_whole = isinstance(place, ShardedTensor)
    parts: list[Any] = [place] if is_whole else list(nested_values(place.build()))
    return {
        name: dict(enumerate(box for part in parts for box in _boxes_of(name, flat, state, part)))
        for name, flat in state.values.items()
    }


def joined(loaded: dict[int, Tensor]) -> Tensor:
    """The run again."""
    return torch.cat([loaded[number].flatten() for number in range(len(loaded))])


def _boxes_of(
    name: str, flat: Tensor, state: OwnedState, part: ShardedTensor
) -> Iterator[ShardedTensor]:
    """What of ``flat`` belongs to ``part``, a tensor of the checkpoint that holds the parameter or
    a slice of it.
    """
    assert part.data is not None and part.data.is_contiguous(), f"{part.key} is no slice of rows"
    offset = (part.data.data_ptr() - state.parameter.data_ptr()) // part.data.element_size()
    first = max(state.start, offset)
    last = min(state.start + len(flat), offset + part.data.numel())
    taken = first - state.start
    stacked = part.prepend_axis_num  # axes of layers and experts, of which this is one
    for begin, shape in boxes(first - offset, last - offset, part.local_shape):
        size = math.prod(shape)
        where = [*[0] * stacked, *begin]
        whole_shape = (*[1] * stacked, *shape)
        yield ShardedTensor(
            key=f"{_PREFIX}.{name}.{part.key}",
            data=flat[taken : taken + size].view(whole_shape),
            dtype=flat.dtype,
            local_shape=whole_shape,
            global_shape=part.global_shape,
            global_offset=tuple(a + b for a, b in zip(part.global_offset, where, strict=True)),
            axis_fragmentations=None,  # boxes are no regular grid
            replica_id=(*part.replica_id[:2], 0),  # pyright: ignore[reportIndexIssue]
            allow_shape_mismatch=part.allow_shape_mismatch,
        )
        taken += size


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Cut the run from ``start`` to ``stop`` of a flattened tensor into boxes of the tensor, in
    order: the end of a row, whole rows, the beginning of a row, and so on inside those.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are from ``first`` to ``last``
    if first > last:
        yield from _within(last, start - last * row, stop - last * row, shape)
        return
    yield from _within(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _within(last, 0, stop - last * row, shape)


def _within(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    for begin, size in boxes(start, stop, shape[1:]):
        yield (row, *begin), (1, *size)
