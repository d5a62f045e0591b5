"""Process groups and the few collectives that the stages need. Every helper is a no-op on one rank,
so callers hold no ``if``.
"""

import atexit
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm import launcher
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.hardware import Hardware, select_hardware

# isort: split
from megatron.core import parallel_state, tensor_parallel

from megatron_opdlm.planning.layout import Layout

T = TypeVar("T")
_POLL_SECONDS = 0.2
_waits = itertools.count()  # for rank 0; every rank counts alike
_groups_of: Layout | None = None  # the layout that Megatron's groups stand for


def init(layout: Layout, *, seed: int = 0, timeout_seconds: int = 600) -> Hardware:
    """Join the process group that torchrun describes (a single process without it) and build
    Megatron's groups.

    Calling it again with another layout rebuilds Megatron's groups; with the same one it keeps
    them, since every gloo group has threads of its own that never end.
    """
    global _groups_of
    hardware = select_hardware()
    layout.data_parallel(launcher.world_size())
    if not dist.is_initialized():
        _init_process_group(hardware, timeout_seconds)
    wanted = replace(layout, sequence_parallel=False)  # needs no groups of its own
    if wanted == _groups_of:
        return hardware
    _destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        distributed_timeout_minutes=timeout_seconds / 60,  # pyright: ignore[reportArgumentType]
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    _groups_of = wanted
    return hardware


def _destroy_groups() -> None:
    """End Megatron's groups. It only forgets them, and the threads of a gloo group wake 100 times a
    second for as long as the group lives.
    """
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None:
            with contextlib.suppress(ValueError):  # a group that this rank is no member of
                dist.destroy_process_group(group)


def _init_process_group(hardware: Hardware, timeout_seconds: int) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    if launcher.is_one_of_several():
        store, rank, ranks = _meet(timeout)
        # torchrun keeps one store over restarts of its ranks, addresses of dead ones included.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt_{attempt}", store)
    else:
        store, rank, ranks = dist.HashStore(), 0, 1  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        hardware.process_group_backend, store=store, rank=rank, world_size=ranks, timeout=timeout
    )
    atexit.register(_leave)


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The ranks' store, this rank and their number. InputError where the place to meet is taken,
    RunError where somebody does not come.
    """
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise InputError(launcher.taken_port()) from None
        raise RunError(launcher.no_meeting(str(error))) from None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Global rank; rank 0 writes files and speaks."""
    return dist.get_rank()


def is_writer() -> bool:
    """True on the one rank that writes files and prints."""
    return dist.get_rank() == 0


def data_parallel_rank() -> int:
    """Which share of the sequences this rank is trained on."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Number of model replicas: each trains on whole sequences."""
    return parallel_state.get_data_parallel_world_size()


def context_rank() -> int:
    """Which share of each packed row this rank works on."""
    return parallel_state.get_context_parallel_rank()


def context_size() -> int:
    """Number of ranks that share the packed rows of one replica."""
    return parallel_state.get_context_parallel_world_size()


def context_group() -> dist.ProcessGroup:
    """Ranks that hold the same weights and work on the same packed rows."""
    return _group(parallel_state.get_context_parallel_group())


def generator_rank() -> int:
    """Which share of the sequences this rank generates: every context rank of every replica holds a
    whole copy of the weights (over its tensor and pipeline ranks) and needs no other to generate.
    """
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def generators() -> int:
    """Number of copies of the model that generate: replicas times context ranks."""
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def expert_size() -> int:
    """Number of ranks that share out the experts of each layer; every forward of one is a forward
    of all, since they trade tokens.
    """
    return parallel_state.get_expert_model_parallel_world_size()


def most_over_experts(value: int) -> int:
    """Largest value over the ranks that share out the experts."""
    if expert_size() == 1:
        return value
    holder = torch.tensor(value, dtype=torch.int64, device=select_hardware().device)
    group = _group(parallel_state.get_expert_model_parallel_group())
    dist.all_reduce(holder, op=dist.ReduceOp.MAX, group=group)
    return int(holder)


def is_first_stage() -> bool:
    """True where token embeddings are (pipeline stage 0)."""
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """True where the final hidden states and the output layer are."""
    return parallel_state.is_pipeline_last_stage()


@dataclass(frozen=True, kw_only=True)
class Sending:
    """A message under way; holds its tensor until it has left."""

    work: dist.Work | None
    tensor: Tensor

    def wait(self) -> Tensor:
        """Block until the message is through; returns its tensor."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def send_to_next_stage(x: Tensor) -> Sending:
    """Send activations to the next pipeline stage, which knows their shape, and go on working."""
    x = x.contiguous()
    work = dist.isend(x, parallel_state.get_pipeline_model_parallel_next_rank())
    return Sending(work=work, tensor=x)


def receive_from_previous_stage(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Blocking receive of activations from the previous pipeline stage."""
    x = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(x, parallel_state.get_pipeline_model_parallel_prev_rank())
    return x


def _group(group: Any) -> dist.ProcessGroup:
    """Megatron's group getters are typed more loosely than what they return."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def tensor_group() -> dist.ProcessGroup:
    """Ranks that hold parts of the same layers."""
    return _group(parallel_state.get_tensor_model_parallel_group())


def broadcast_from_last_stage(x: Tensor) -> Sending:
    """Make ``x`` of the last stage's first tensor rank the value on every rank of this replica.

    So all ranks of a replica take the same decisions whatever the rounding of their reductions.
    The values are there, in place, once ``wait`` returns.
    """
    group = _group(parallel_state.get_model_parallel_group())
    if dist.get_world_size(group) == 1:
        return Sending(work=None, tensor=x)
    source = _last_stage_source(dist.get_process_group_ranks(group))
    work = dist.broadcast(x, source, group=group, async_op=True)
    return Sending(work=work, tensor=x)


def pipeline_size() -> int:
    """Number of pipeline stages."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def least_over_replica(value: int) -> int:
    """Smallest value over the ranks of this model replica."""
    group = _group(parallel_state.get_model_parallel_group())
    holder = torch.tensor(value, dtype=torch.int64, device=select_hardware().device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(holder, op=dist.ReduceOp.MIN, group=group)
    return int(holder)


def _last_stage_source(ranks: list[int]) -> int:
    """Global rank of (last pipeline stage, tensor rank 0): pipeline stages are the slowest
    dimension of the ranks of a copy of the model.
    """
    return sorted(ranks)[-parallel_state.get_tensor_model_parallel_world_size()]


def broadcast_over_pipeline(x: Tensor) -> Tensor:
    """Copy ``x`` from the last pipeline stage to all stages (in place)."""
    if pipeline_size() > 1:
        dist.broadcast(
            x,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=_group(parallel_state.get_pipeline_model_parallel_group()),
        )
    return x


def sum_over_context(x: Tensor) -> Tensor:
    """Sum over the ranks that share packed rows (in place). Not differentiated."""
    if context_size() > 1:
        dist.all_reduce(x, group=context_group())
    return x


def gather_rows_over_context(x: Tensor, rows: int) -> Tensor:
    """x [at most ``rows``, k] of each context rank -> [context ranks * rows, k], in their order,
    each rank's part filled up with anything. Not differentiated.
    """
    if context_size() == 1:
        return x
    own = x.new_zeros(rows, *x.shape[1:])
    own[: len(x)] = x
    parts = [torch.empty_like(own) for _ in range(context_size())]
    dist.all_gather(parts, own, group=context_group())
    return torch.cat(parts)


def sum_over_generators(x: Tensor) -> Tensor:
    """Sum over all copies of the model (in place). Not differentiated."""
    if generators() > 1:
        dist.all_reduce(x, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return x


def gather_objects_over_data_parallel(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all model replicas, in data parallel order, on every rank. The
    context ranks of a replica must give the same list.
    """
    return _gather_objects(items, parallel_state.get_data_parallel_group_gloo())


def gather_objects_over_generators(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all copies of the model, in their order, on every rank."""
    group = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    return _gather_objects(items, group)


def _gather_objects(items: list[Any], group: Any) -> list[Any]:
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return list(items)
    shares: list[Any] = [None] * ranks
    dist.all_gather_object(shares, items, group=group)
    return [item for share in shares for item in share]


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    holder = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def all_succeeded(ok: bool) -> bool:
    """True on every rank only if ``ok`` is True on every rank; keeps collectives after a local
    check from hanging.
    """
    flag = torch.tensor(0 if ok else 1, device=select_hardware().device)
    if dist.get_world_size() > 1:
        dist.all_reduce(flag)
    return int(flag) == 0


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, on every rank (all call it); it names that rank
    where there are several. None: there is none. A rank that raised alone would leave the others
    waiting in the next collective.
    """
    if dist.get_world_size() == 1:
        return problem
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            return f"rank {rank}: {found}" if rank else found
    return None


def on_writer(action: Callable[[], str | None]) -> str | None:
    """Run file operations on rank 0, all ranks together. Why they failed (an OSError, or the text
    that ``action`` returns), on every rank, or None; the caller names the remedy.
    """
    problem: str | None = None
    if is_writer():
        try:
            problem = action()
        except OSError as error:
            problem = str(error) or type(error).__name__
    return first_problem(problem)


def wait_for_writer(action: Callable[[], T], alive: Callable[[], None]) -> T | None:
    """Do something on rank 0 that may take longer than a collective waits; the others wait for its
    sign, saying ``alive``. Its result on rank 0, None elsewhere.
    """
    key, store = f"writer_is_done/{next(_waits)}", dist.distributed_c10d._get_default_store()
    if is_writer():
        result = action()
        store.set(key, "")
        return result
    while not store.check([key]):
        alive()
        time.sleep(_POLL_SECONDS)
    return None


def max_over_ranks(value: float) -> float:
    """Largest value over all ranks."""
    holder = torch.tensor(value, dtype=torch.float64, device=select_hardware().device)
    if dist.get_world_size() > 1:
        dist.all_reduce(holder, op=dist.ReduceOp.MAX)
    return float(holder)


def gather_numbers(mine: Sequence[float]) -> list[list[float]]:
    """As many numbers of every rank, in the order of the ranks, on every rank."""
    own = torch.tensor(mine, dtype=torch.float64, device=select_hardware().device)
    if dist.get_world_size() == 1:
        return [own.tolist()]
    table = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(table, own)
    return [row.tolist() for row in table]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()
