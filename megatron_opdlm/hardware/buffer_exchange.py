"""What the ranks of a CPU run send each other of Megatron's gradient and parameter buffers.

Every rank sends each of the others its part and nothing else, out of the buffers and into them.
Gloo's reduce-scatter would sum whole copies on every rank and then keep one part, and its
all-gather go through copies, too: several times the work, also for a rank that is alone.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.hardware.group_adam import replace_in

PIECE = 2**22  # numbers received at a time, beside the buffer that they are added to


def reduce_scatter(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> None:
    """Sum the parts [n] of all R ranks' ``given`` [R * n] that belong to this one into ``output``,
    its place in ``given``: first its own, then from the rank before it on downwards.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = given.chunk(size)
    assert output.data_ptr() == parts[rank].data_ptr() and len(output) == len(parts[-1])
    received = output.new_empty(min(PIECE, len(output)) if size > 1 else 0)
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        for own, theirs in zip(output.split(PIECE), parts[to].split(PIECE), strict=True):
            arriving = received[: len(own)]
            _exchange(group, [(theirs, to)], [(arriving, source)])
            own += arriving


def all_gather(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> None:
    """Fill ``output`` [R * n] with the parts [n] of all R ranks; ``given`` is this one's there."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = output.chunk(size)
    assert given.data_ptr() == parts[rank].data_ptr() and len(given) == len(parts[-1])
    others = [other for other in range(size) if other != rank]
    _exchange(group, [(given, to) for to in others], [(parts[of], of) for of in others])


def _exchange(
    group: dist.ProcessGroup,
    sent: list[tuple[Tensor, int]],
    received: list[tuple[Tensor, int]],
) -> None:
    """(tensor, rank in the group) of messages that are all under way at once."""
    works = [dist.irecv(x, group=group, group_src=source) for x, source in received]
    works += [dist.isend(x, group=group, group_dst=to) for x, to in sent]
    for work in works:
        assert work is not None
        work.wait()


def use_in_megatron() -> None:
    """For every exchange that Megatron waits for; one that overlaps the backward pass is gloo's."""
    module = "megatron.core.distributed.param_and_grad_buffer"
    of_megatron = vars(importlib.import_module(module))

    def instead(
        ours: Callable[[Tensor, Tensor, dist.ProcessGroup], None], theirs: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(theirs)
        def exchange(
            output: Tensor, given: Tensor, *, group: dist.ProcessGroup, **options: Any
        ) -> Any:
            if options.get("async_op") or options.get("op", dist.ReduceOp.SUM) != dist.ReduceOp.SUM:
                return theirs(output, given, group=group, **options)
            with torch.no_grad():
                return ours(output, given, group)

        return exchange

    ours = {"dist_all_gather_func": all_gather, "dist_reduce_scatter_func": reduce_scatter}
    replace_in(module, **{name: instead(own, of_megatron[name]) for name, own in ours.items()})
