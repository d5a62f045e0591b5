"""Writes the ``weights/`` of a checkpoint from Hugging Face weights, one tensor at a time.

The directory is what ``dist_checkpointing.save`` of a GPTModel leaves: the same keys, global shapes
and side files, in torch's distributed-checkpoint format, which any parallel layout reads. Megatron
would hold a rank's whole state; here torch's planner is told what will be written, and each tensor
is made when its turn comes. Which file holds what depends on the model alone, not on how many
processes write, so one process and several leave the same bytes.
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoint_tools.streaming.megatron_weights import stored_key
from checkpoint_tools.streaming.team import Team, shares
from megatron_opdlm.errors import RunError
from megatron_opdlm.model_files.checksums import HashingFile
from megatron_opdlm.model_files.names import (
    QKV,
    QKV_BIAS,
    megatron_from_hf,
    megatron_names,
    sources,
)
from megatron_opdlm.model_files.safetensors_dir import HFWeights
from megatron_opdlm.model_files.shape import ModelShape, hf_names
from megatron_opdlm.reporting.progress import Progress

# What Megatron writes beside the tensors: how it laid them out, and in which format.
CONTENT = {
    "content_metadata": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
}
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
FILE_BYTES = 256 * 1024**2  # of weights in a file; several, so that ranks can share them
THREADS = 3  # files that a process writes at a time: some are hashed while another is flushed
PIECE_BYTES = 64 * 1024**2  # of a matrix that stands alone (embedding, output layer) in a piece
_ALIGNMENT = 64  # bytes; torch aligns a tensor to it within its record, and we the records


@dataclass(frozen=True)
class Piece:
    """One stored tensor: a block of the global tensor under ``key``."""

    key: str
    total: tuple[int, ...]  # size of the global tensor
    offset: tuple[int, ...]  # of the block in it
    size: tuple[int, ...]  # of the block
    name: str  # Megatron's, with global numbers
    row_axis: int  # leading dimensions are numbers of layer and expert
    source: str | None = None  # the Hugging Face tensor whose rows these are; None: joined
    first_row: int = 0  # in the source

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def pieces(shape: ModelShape, item_bytes: int) -> list[Piece]:
    """All tensors to store, in the order in which they are written; a value takes ``item_bytes``.

    All but the query/key/value matrices and biases are their sources one below the other, so these
    are written source by source, straight from the file that holds them.
    """
    sizes = hf_names(shape)
    keys = {name: stored_key(name) for name in megatron_names(shape)}
    last: dict[str, tuple[int, ...]] = {}  # the largest (layer, expert) under each key
    for key, indices in keys.values():
        last[key] = tuple(map(max, last.get(key, indices), indices))
    found = []
    for name, (key, indices) in keys.items():
        parts: list[tuple[str | None, int]] = [(s, sizes[s][0]) for s in sources(name, shape)]
        rows, rest = sum(count for _, count in parts), sizes[sources(name, shape)[0]][1:]
        if name.endswith((QKV, QKV_BIAS)):
            parts = [(None, rows)]
        whole = Piece(
            key=key,
            total=(*(number + 1 for number in last[key]), rows, *rest),
            offset=(*indices, 0, *(0 for _ in rest)),
            size=(*(1 for _ in indices), rows, *rest),
            name=name,
            row_axis=len(indices),
        )
        # Layers are pieces; a matrix that stands alone can be far larger than any of theirs.
        most = max(1, PIECE_BYTES // (item_bytes * math.prod(rest))) if not indices else rows
        found += _cut(whole, parts, most)
    return found


def _cut(whole: Piece, parts: Sequence[tuple[str | None, int]], most: int) -> Iterator[Piece]:
    """Pieces of at most ``most`` rows, each with rows of one of ``parts`` (source, rows)."""
    axis = whole.row_axis
    start = 0
    for source, rows in parts:
        for first in range(0, rows, most):
            offset, size = list(whole.offset), list(whole.size)
            offset[axis], size[axis] = start + first, min(most, rows - first)
            yield replace(
                whole, offset=tuple(offset), size=tuple(size), source=source, first_row=first
            )
        start += rows


def write_weights(
    directory: Path, weights: HFWeights, dtype: torch.dtype, team: Team, progress: Progress
) -> dict[str, str]:
    """Write ``directory``, which does not exist yet, all processes of the team together; returns
    the SHA-256 of its files.

    Raises OSError where a file cannot be written, and RunError on the other processes.
    """
    team.on_first(directory.mkdir)
    plan = _Plan(weights, dtype, team)
    writer = _Writer(directory, plan, progress)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=plan, no_dist=team.size == 1)
    except CheckpointException as error:
        raise _of_this_rank(error, team.rank) from None
    return team.on_first(lambda: writer.sha256)


def _of_this_rank(error: CheckpointException, rank: int) -> Exception:
    """Its own error on the rank that failed, a RunError that names one that did on the others."""
    if rank in error.failures:
        problem: Any = error.failures[rank][0]
        return problem if isinstance(problem, Exception) else RunError(repr(problem))
    other, (problem, _) = next(iter(error.failures.items()))
    return RunError(f"rank {other} failed ({problem}), so nothing was written")


class _Plan(SavePlanner):
    """What is written where, known in advance, and the tensors, made when they are asked for."""

    def __init__(self, weights: HFWeights, dtype: torch.dtype, team: Team) -> None:
        self._weights, self._dtype = weights, dtype
        self.items: list[tuple[Piece, WriteItem]] = [
            (piece, _write_item(piece, dtype))
            for piece in pieces(weights.model_shape, dtype.itemsize)
        ]
        self._piece_of = {(item.index.fqn, item.index.offset): piece for piece, item in self.items}
        costs = [piece.numel * dtype.itemsize for piece, _ in self.items]
        self.files = shares(costs, max(1, -(-sum(costs) // FILE_BYTES)))
        own = team.share([sum(costs[i] for i in file) for file in self.files])
        self.own = [(number, [self.items[i][1] for i in self.files[number]]) for number in own]

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """There is no state to plan from."""

    def create_local_plan(self) -> SavePlan:
        """The tensors in this process's files."""
        return SavePlan([item for _, items in self.own for item in items])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The description of all tensors, made here: it must not depend on who writes what."""
        whole = SavePlan([item for _, item in self.items])
        return all_plans, create_default_global_save_plan([whole], rewrite_index_hints=False)[1]

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing is left to decide."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """One tensor, made from the Hugging Face weights; whoever writes it drops it."""
        piece = self._piece_of[write_item.index.fqn, write_item.index.offset]
        if piece.source is None:
            shape = self._weights.model_shape
            tensor = megatron_from_hf(piece.name, shape, self._weights.get, 0, 1, shape.vocab_size)
        else:
            rows = piece.size[piece.row_axis]
            tensor = self._weights.rows(piece.source, piece.first_row, piece.first_row + rows)
        return tensor.to(self._dtype).view(piece.size)


class _Writer(dcp.FileSystemWriter):
    """Writes one tensor at a time into the planned files, each at a multiple of 64 bytes so that a
    mapped file can be used in place, and the description last.
    """

    def __init__(self, directory: Path, plan: _Plan, progress: Progress) -> None:
        super().__init__(directory, overwrite=False)
        self._directory, self._plan, self._progress = directory, plan, progress
        self.sha256: dict[str, str] = {}  # complete on the coordinator, after ``finish``

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's files."""
        # The option is each thread's own since torch 2.13, before it was the process's.
        in_threads = {"initializer": torch.serialization.set_crc32_options, "initargs": (False,)}
        with _no_crc32(), ThreadPoolExecutor(THREADS, **in_threads) as pool:
            written = pool.map(lambda own: self._write_file(*own), self._plan.own)
            results = [result for of_file in written for result in of_file]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(self, number: int, items: Sequence[WriteItem]) -> list[WriteResult]:
        with HashingFile(self._directory / _file_name(number)) as file:
            places = []
            for item in items:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                start = file.tell()
                tensor = self._plan.resolve_data(item)
                torch.save(tensor, cast(IO[bytes], file))
                file.raise_failure()
                self._progress.advance(count=tensor.nbytes)
                places.append((start, file.tell() - start))
        sha256 = file.sha256
        return [
            WriteResult(item.index, length, storage_data=(number, start, length, sha256))
            for item, (start, length) in zip(items, places, strict=True)
        ]

    def storage_meta(self) -> None:
        """No name and no mark of this very save: the same weights give the same description."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write Megatron's side files and the description.

        Results that came from other processes are copied into objects of our own: pickle writes an
        object that occurs twice only once, so the description would tell who wrote what.
        """
        names = [_file_name(number) for number in range(len(self._plan.files))]
        found = [result.storage_data for of_rank in results for result in of_rank]
        own: list[WriteResult] = []
        for (_, item), (number, start, length, sha256) in zip(self._plan.items, found, strict=True):
            self.sha256[names[number]] = sha256
            place = _StorageInfo(names[number], start, length)
            own.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        torch.save(CONTENT, self._directory / "common.pt")
        super().finish(metadata, [own])
        (self._directory / "metadata.json").write_text(json.dumps(BACKENDS))


def _write_item(piece: Piece, dtype: torch.dtype) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
    properties, total = TensorProperties(dtype=dtype), torch.Size(piece.total)
    return WriteItem(
        index=MetadataIndex(piece.key, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=total),
    )


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Leave the archives' own checksums out: torch does not read them, the manifest has better."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
