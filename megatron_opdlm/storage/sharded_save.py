"""Writes the tensors of a checkpoint (torch_dist): planned by Megatron over all ranks, written by
threads of each rank while the run goes on.

Megatron's own writers are forked processes, which outlive a killed rank, hang the save where one of
them dies, and may not be forked once a GPU is in use. Threads end with their rank. The format is
Megatron's, file by file.
"""

import pickle
import queue
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_opdlm import parallel
from megatron_opdlm.supervision import activity

# isort: split
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_opdlm.errors import RunError
from megatron_opdlm.model_files.checksums import HashingFile
from megatron_opdlm.storage.safe_metadata import COMMON

BACKEND = ("torch_dist", 1)
_CONTENT = "content_metadata"  # Megatron's key in ``common.pt``
_WRITERS = 2  # threads, and files of tensors, a rank


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that is on disk."""

    name: str
    bytes: int
    sha256: str
    places: list[WriteResult]  # of its tensors, for the index


@dataclass(kw_only=True)
class _File:
    """What is to become a file: tensors, or everything that is not split over ranks."""

    path: Path
    tensors: list[tuple[WriteItem, Tensor]] = field(default_factory=list)
    common: dict[str, Any] | None = None

    def write(self) -> Written:
        """Write it; each tensor is let go once it is written."""
        places = []
        with HashingFile(self.path) as file:
            stream: Any = file  # to torch, which needs ``write`` alone
            if self.common is not None:
                torch.save(self.common, stream)
            self.tensors.reverse()
            while self.tensors:
                item, tensor = self.tensors.pop()
                start = file.tell()
                torch.save(tensor.cpu(), stream)
                file.raise_failure()
                place = _StorageInfo(self.path.name, start, file.tell() - start)
                size = place.length
                places.append(WriteResult(index=item.index, size_in_bytes=size, storage_data=place))
        return Written(name=self.path.name, bytes=file.bytes, sha256=file.sha256, places=places)


class HostCopies:
    """Copies of tensors in host memory, which training cannot change any more. Memory that was
    locked for a GPU stays for the next save.
    """

    def __init__(self) -> None:
        self._locked: dict[Any, Tensor] = {}

    def take(self, file: _File, live: set[int]) -> None:
        """Replace a file's tensors by copies where they lie on a device or at an address in
        ``live``; others belong to the save already.
        """
        for number, (item, tensor) in enumerate(file.tensors):
            if tensor.device.type != "cpu":
                key = (file.path.name, number, tensor.shape, tensor.dtype)
                if key not in self._locked:
                    self._locked[key] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                file.tensors[number] = item, self._locked[key].copy_(tensor)
            elif tensor.data_ptr() in live:
                file.tensors[number] = item, tensor.clone()


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would write."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.index = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


class ShardedSave:
    """One save, begun by all ranks together; ``finish`` ends it, again all together."""

    def __init__(
        self,
        state: dict[str, Any],
        directory: Path,
        *,
        content: dict[str, Any],
        copies: HostCopies | None = None,
    ) -> None:
        """Plan and begin to write into ``directory``, which exists. With ``copies`` the state may
        change as soon as this returns, without only after ``finish``.

        ``content``: how the state is laid out, for whoever loads it.
        """
        # Megatron would start a server process for its writers' results; there are no such writers.
        setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010 -- typed as None
        sharded, common = save_preprocess(state | {_CONTENT: content})
        live = {t.data.data_ptr() for t in nested_values(sharded) if _has_data(t)}
        self._plan = _Plan(*BACKEND, thread_count=_WRITERS)
        replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        planner: Any = FullyParallelSaveStrategyWrapper(self._plan, replicas)
        planner.async_save(sharded, str(directory))
        self._directory = directory
        self._files = list(self._split(common))
        if copies is not None:
            for file in self._files:
                copies.take(file, live)
        pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="checkpoint")
        self._under_way: list[Future[Written]] = [pool.submit(file.write) for file in self._files]
        pool.shutdown(wait=False)

    def _split(self, common: dict[str, Any]) -> Iterable[_File]:
        if parallel.is_writer():
            yield _File(path=self._directory / COMMON, common=common)
        for path, _, (objects, tensors) in self._plan.writer.write_buckets or []:
            assert not objects, "objects would have to be unpickled on loading"
            yield _File(path=Path(path), tensors=list(tensors))
        self._plan.writer.write_buckets = None

    @property
    def done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return all(file.done() for file in self._under_way)

    def finish(self) -> list[Written]:
        """Wait for the writers of all ranks; on rank 0 the files of all. RunError on every rank,
        with the reason, where one of them failed.
        """
        self._wait()
        written: list[Written] = []
        problem: str | None = None
        for file in self._under_way:
            try:
                written.append(file.result())
            except (OSError, RuntimeError, MemoryError, pickle.PicklingError) as error:
                problem = problem or " ".join(str(error).split()) or type(error).__name__
        reason = parallel.first_problem(problem)
        if reason is not None:
            raise RunError(reason)
        shares: list[Any] = [written]
        if dist.get_world_size() > 1:
            shares = [None] * dist.get_world_size()
            dist.gather_object(written, shares if parallel.is_writer() else None)
        return [file for share in shares for file in share] if parallel.is_writer() else []

    def _wait(self) -> None:
        """Until this rank has nothing left to write; every tensor is a sign of life."""
        seen = -1
        while not self.done:
            left = sum(len(file.tensors) for file in self._files)
            if left != seen:
                activity.advance()
                seen = left
            wait(self._under_way, timeout=1)

    def write_index(self, written: list[Written]) -> None:
        """Rank 0, after ``finish``: the index of all tensors, and Megatron's mark of a complete
        checkpoint.
        """
        index: Metadata = self._plan.index
        vars(index).pop("all_local_plans", None)  # as large again, and of use to nobody here
        self._plan.writer.finish(index, [file.places for file in written])
        save_config(CheckpointingConfig(*BACKEND), str(self._directory))


def _has_data(value: Any) -> bool:
    return isinstance(value, ShardedTensor) and value.data is not None
