"""Writes the safetensors shards of a Hugging Face directory, every tensor into its place.

Names, sizes and places follow from the model's shape, so headers, index and files of full length
come first, and then tensors in any order, by one process or by several: the bytes are the same.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.model_files.safetensors_dir import INDEX, ITEM_BYTES, SINGLE
from megatron_opdlm.model_files.shape import ModelShape, hf_names

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SHARD_BYTES = 5 * 1000**3
_NAMES = {"fp32": "F32", "bf16": "BF16"}
_BLOCK_VALUES = 1 << 23  # converted at a time


@dataclass(frozen=True)
class Shard:
    """One file: its header, and where each tensor's bytes start and end in it."""

    file: str
    header: bytes
    places: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return max(stop for _, stop in self.places.values())


class ShardWriter:
    """The shards of one export under construction, in a directory that nobody reads yet."""

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        dtype: str,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """``dtype``: "fp32" or "bf16". A shard exceeds ``shard_bytes`` for one tensor only."""
        self.directory, self.shape, self.dtype = directory, shape, dtype
        self._sizes = hf_names(shape)
        self._shards = plan_shards(self._sizes, _NAMES[dtype], shard_bytes)
        self._place = {
            name: (shard, *place) for shard in self._shards for name, place in shard.places.items()
        }
        self._open: dict[str, int] = {}
        self._opening = threading.Lock()

    def create_files(self) -> None:
        """Headers and index, once; the files have their full length from the start."""
        for shard in self._shards:
            with (self.directory / shard.file).open("xb") as file:
                file.write(shard.header)
                file.truncate(shard.bytes)
        if len(self._shards) > 1:
            total = sum(stop - start for _, start, stop in self._place.values())
            weight_map = {name: shard.file for name, (shard, _, _) in self._place.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: "Tensor") -> int:
        """Put one tensor into its place, rounded to the type of the export; returns its bytes.
        Threads may write at once.

        Raises OSError where the file cannot be written.
        """
        import torch

        shard, start, stop = self._place[name]
        assert tuple(tensor.shape) == self._sizes[name], (name, tuple(tensor.shape))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        flat, position = tensor.reshape(-1), start
        for block in flat.split(_BLOCK_VALUES) if flat.dtype != dtype else (flat,):
            data = block.to(dtype).view(torch.uint8).numpy().data
            while data:
                written = os.pwrite(self._descriptor(shard.file), data, position)
                data, position = data[written:], position + written
        assert position == stop, name
        return stop - start

    def close(self) -> None:
        """Bring what this process wrote to disk."""
        for descriptor in self._open.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, file: str) -> int:
        with self._opening:
            if file not in self._open:
                self._open[file] = os.open(self.directory / file, os.O_WRONLY)
            return self._open[file]


def write_weights(
    directory: Path,
    shape: ModelShape,
    tensors: Iterable[tuple[str, "Tensor"]],
    dtype: str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write all of ``hf_names(shape)``, in any order, by this process alone."""
    writer = ShardWriter(directory, shape, dtype, shard_bytes)
    writer.create_files()
    missing = set(hf_names(shape))
    for name, tensor in tensors:
        writer.write(name, tensor)
        missing.remove(name)
    writer.close()
    assert not missing, missing


def plan_shards(sizes: dict[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> list[Shard]:
    """Shards of tensors with these names and sizes: filled in order, closed before the tensors of
    one would exceed ``shard_bytes``. ``dtype`` is safetensors' name.
    """
    groups: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        cost = math.prod(size) * ITEM_BYTES[dtype]
        if groups[-1] and sum(groups[-1].values()) + cost > shard_bytes:
            groups.append({})
        groups[-1][name] = cost
    many = len(groups) > 1
    shards = []
    for number, costs in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if many else SINGLE
        shards.append(_shard(file, costs, sizes, dtype))
    return shards


def _shard(
    file: str, costs: dict[str, int], sizes: dict[str, tuple[int, ...]], dtype: str
) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, cost in costs.items():
        offsets[name] = (end, end + cost)
        entries[name] = {"dtype": dtype, "shape": sizes[name], "data_offsets": offsets[name]}
        end += cost
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight bytes
    header = struct.pack("<Q", len(text)) + text
    places = {name: (len(header) + a, len(header) + b) for name, (a, b) in offsets.items()}
    return Shard(file, header, places)
