"""Weights of a Hugging Face directory: checked before anything is read, then read where they lie.

A shard's header says how many bytes must follow it, so a truncated copy is found by its size,
without reading it. Torch is imported only when a tensor is read.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.file_kinds import foreign_kind
from megatron_opdlm.model_files.shape import ModelShape, hf_names, read_json, read_shape

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
FLOATS = tuple(ITEM_BYTES)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what its shard's header says of it."""

    file: Path
    dtype: str  # safetensors' name: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    stop: int

    def is_consistent(self) -> bool:
        """True if as many bytes belong to the tensor as its shape and type need."""
        return self.stop - self.start == math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises InputError when it is missing, truncated or no
    safetensors file, and when its tensors overlap or leave bytes unused, which the format forbids.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} lacks the shard {path.name}; copy it again")
    kind = foreign_kind(path)
    if kind is not None:
        raise InputError(f"{path} is {kind}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise InputError(f"{path} is truncated ({size} bytes end in its header); copy it again")
        text = file.read(length)
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
        end = _end(entries, 8 + length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path} is no safetensors file (broken header); copy it again") from None
    if size != end:
        problem = "is truncated" if size < end else "has trailing bytes"
        raise InputError(
            f"{path} {problem}: {size} bytes, but its header describes {end}; copy it again"
        )
    return entries


def _entry(path: Path, first: int, entry: dict[str, Any]) -> TensorEntry:
    """One tensor of a header whose data begins at byte ``first``. ValueError, TypeError or KeyError
    where it is none.
    """
    start, stop = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("offsets and sizes are integers from 0")
    if not isinstance(dtype, str):
        raise TypeError("a type is a name")
    return TensorEntry(path, dtype, shape, first + start, first + stop)


def _end(entries: Mapping[str, TensorEntry], first: int) -> int:
    """Where the last tensor ends. ValueError unless they follow each other from byte ``first``."""
    position = first
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position or entry.stop < entry.start:
            raise ValueError("tensors overlap or leave bytes between them")
        position = entry.stop
    return position


class HFWeights:
    """A checked Hugging Face model whose tensors are read one at a time."""

    added_rows = 0  # of the vocabulary, that no file holds

    def __init__(self, directory: Path, shape: ModelShape, entries: Mapping[str, TensorEntry]):
        self.directory = directory
        self.model_shape = shape
        self.entries = entries
        self._open: dict[Path, memoryview] = {}

    def names(self) -> list[str]:
        """Hugging Face names, without a tied model's redundant ``lm_head.weight``."""
        return list(hf_names(self.model_shape))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def nbytes(self, name: str) -> int:
        return self.entries[name].stop - self.entries[name].start

    def dtype(self, name: str) -> str:
        """Safetensors' name of the stored type: "F32", "BF16" or "F16"."""
        return self.entries[name].dtype

    def stored_dtype(self) -> str:
        """The project's type that loses nothing: "bf16" if all are, else "fp32"."""
        return "bf16" if all(self.dtype(name) == "BF16" for name in self.names()) else "fp32"

    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def get(self, name: str) -> "Tensor":
        """One whole tensor as stored. It lies in the mapped file, privately: its bytes are read
        when they are used, and writing to it changes nothing else.
        """
        return self._read(self.entries[name])

    def _read(self, entry: TensorEntry) -> "Tensor":
        import torch

        data = self._map(entry.file)[entry.start : entry.stop]
        flat = torch.frombuffer(data, dtype=torch.uint8)
        dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()  # the format lets a tensor start anywhere
        return flat.view(dtype).view(entry.shape)

    def rows(self, name: str, first: int, stop: int) -> "Tensor":
        """Rows ``first`` to ``stop`` of a tensor, as if they were a tensor of their own: what saves
        it saves no more than these.
        """
        entry = self.entries[name]
        row_bytes = (entry.stop - entry.start) // entry.shape[0]
        part = replace(
            entry,
            shape=(stop - first, *entry.shape[1:]),
            start=entry.start + first * row_bytes,
            stop=entry.start + stop * row_bytes,
        )
        return self._read(part)

    def _map(self, file: Path) -> memoryview:
        if file not in self._open:
            with file.open("rb") as opened:
                private = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._open[file] = memoryview(private)
        return self._open[file]

    def check_tied_head(self) -> None:
        """Some tied models also store ``lm_head.weight``. Raises InputError when it differs from
        the embedding.
        """
        import torch

        if not self.model_shape.tied or HEAD not in self.entries:
            return
        if not torch.equal(self.get(HEAD), self.get(EMBEDDING)):
            raise InputError(
                f"{self.directory}: tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}; "
                "set tie_word_embeddings to false in config.json, or remove the tensor"
            )

    def close(self) -> None:
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_weights(hf_dir: Path | str, shape: ModelShape | None = None) -> HFWeights:
    """Check a Hugging Face model directory and open its weights.

    ``shape`` None reads it from the directory. Raises InputError for a missing, truncated or broken
    shard, and for tensors that are missing, unexpected, of another shape or of no floating type,
    before any tensor is read.
    """
    directory = Path(hf_dir)
    shape = shape or read_shape(directory)
    entries = _find_entries(directory)
    expected = hf_names(shape)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise InputError(
            f"{directory} lacks {_listed(missing)}; copy the weights again, all shards"
        )
    allowed = {*expected, HEAD} if shape.tied else set(expected)
    unexpected = [name for name in entries if name not in allowed]
    if unexpected:
        raise InputError(
            f"{directory} holds {_listed(unexpected)} which a {shape.family.name} of its "
            "config.json has not; use the weights that belong to this config.json"
        )
    for name, size in {**expected, HEAD: expected[EMBEDDING]}.items():
        if name in entries and entries[name].shape != size:
            raise InputError(
                f"{directory}: {name} has shape {list(entries[name].shape)}, but config.json makes "
                f"it {list(size)}; use the config.json that belongs to these weights"
            )
        if name in entries and entries[name].dtype not in FLOATS:
            raise InputError(
                f"{directory}: {name} is stored as {entries[name].dtype}; use unquantised weights "
                f"({', '.join(FLOATS)})"
            )
        if name in entries and not entries[name].is_consistent():
            raise InputError(
                f"{entries[name].file} is no safetensors file (broken header: the bytes of {name} "
                "are not those of its shape); copy it again"
            )
    return HFWeights(directory, shape, entries)


def _find_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the single file or of the indexed shards; the single file wins, as in
    transformers.
    """
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        other = "only PyTorch .bin weights" if list(directory.glob("*.bin")) else "no weights"
        if list(directory.glob("*.safetensors")):
            other = f"safetensors shards but no {INDEX}"
        raise InputError(f"{directory} has {other}; it needs {SINGLE}, or shards with {INDEX}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise InputError(f"{directory / INDEX} has no valid weight_map; copy the file again")
    shards = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    lost = [name for name, file in weight_map.items() if name not in shards[file]]
    if lost:
        raise InputError(
            f"{directory}: the shards lack {_listed(lost)} that {INDEX} promises; copy them again"
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
