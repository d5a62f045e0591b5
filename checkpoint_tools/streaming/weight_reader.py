"""Reads torch's distributed checkpoints (Megatron's ``torch_dist``) a part at a time.

A stored tensor is a ``torch.save`` record inside a file. ``torch.load`` reads the record's header
without its data, which is mapped: where one record holds all that is asked for, nothing is copied,
and what takes memory is one part put together from the records of several ranks.
"""

import io
import itertools
import math
import mmap
import os
from collections import defaultdict
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_opdlm.errors import InputError
from megatron_opdlm.storage.safe_metadata import read_metadata

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingException

_DATA = "data/0"  # the one storage of a record that holds one tensor


class _Block(NamedTuple):
    """A stored block of a global tensor, and where its record lies."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    start: int  # bytes
    length: int  # bytes


class StoredWeights:
    """The tensors of a distributed checkpoint by key, whatever layout wrote them."""

    def __init__(self, directory: Path) -> None:
        """Read the description. Raises InputError where there is none, or a broken one."""
        self.directory = directory
        try:
            self._metadata = read_metadata(directory)
        except (OSError, CheckpointingException) as error:
            raise self._unreadable(error) from None
        self._blocks: dict[tuple[str, int], dict[tuple[int, ...], list[_Block]]] = {}
        self._mapped: dict[str, memoryview] = {}

    def __contains__(self, key: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(key), TensorStorageMetadata)

    def size(self, key: str) -> tuple[int, ...]:
        """Size of the whole tensor."""
        return tuple(self._described(key).size)

    def files(self, prefix: str) -> list[str]:
        """The files with tensors whose keys start with ``prefix``."""
        places = (self._metadata.storage_data or {}).items()
        return sorted({at.relative_path for key, at in places if key.fqn.startswith(prefix)})

    def read(self, key: str, indices: tuple[int, ...] = ()) -> Tensor:
        """``tensor[indices]``, leading dimensions only: the part of one layer, of one expert.

        It may lie in the mapped file, privately: writing to it changes nothing else. Raises
        InputError for a missing key and for files that are damaged.
        """
        described = self._described(key)
        lead, size = len(indices), tuple(described.size)[len(indices) :]
        blocks = self._blocks_at(key, lead).get(indices, [])
        only = blocks[0] if len(blocks) == 1 else None
        if only is not None and only.size == (*(1 for _ in indices), *size):
            return self._load(only, described.properties.dtype).view(size)
        target = torch.empty(size, dtype=described.properties.dtype)
        filled = 0
        for block in blocks:
            inner = tuple(i - o for i, o in zip(indices, block.offset[:lead], strict=True))
            part = self._load(block, described.properties.dtype)[inner]
            place = (slice(o, o + s) for o, s in zip(block.offset[lead:], part.shape, strict=True))
            target[tuple(place)] = part
            filled += part.numel()
        if filled != target.numel():
            raise self._unreadable(f"{key} {list(indices)} has {filled} of {target.numel()} values")
        return target

    def _described(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise self._unreadable(f"it has no tensor {key}")
        dtype = getattr(getattr(found, "properties", None), "dtype", None)
        sized = all(hasattr(found, part) for part in ("size", "chunks"))
        if not sized or not isinstance(dtype, torch.dtype):
            raise self._unreadable(f"its index has no whole description of {key}")
        return found

    def _blocks_at(self, key: str, lead: int) -> dict[tuple[int, ...], list[_Block]]:
        """The blocks of ``key`` under each value that their first ``lead`` indices can take."""
        if (key, lead) not in self._blocks:
            found: dict[tuple[int, ...], list[_Block]] = defaultdict(list)
            for block in self._described_blocks(key):
                ends = zip(block.offset, block.size, strict=True)
                spans = [range(o, o + s) for o, s in ends][:lead]
                for indices in itertools.product(*spans):
                    found[indices].append(block)
            self._blocks[key, lead] = dict(found)
        return self._blocks[key, lead]

    def _described_blocks(self, key: str) -> list[_Block]:
        """The blocks that make up ``key``. Raises InputError where they do not: a damaged index may
        hold any number, and lack anything.
        """
        try:
            whole, blocks = self.size(key), []
            for chunk in self._described(key).chunks:
                where = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
                block = _Block(offset, size, where.relative_path, where.offset, where.length)
                if not all(
                    0 <= o < o + s <= w for o, s, w in zip(offset, size, whole, strict=True)
                ):
                    raise self._unreadable(f"a part of {key} lies outside it")
                blocks.append(block)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise self._unreadable(f"its index has no whole description of {key}") from None
        values = sum(math.prod(block.size) for block in blocks)
        if values != math.prod(whole):
            raise self._unreadable(f"{key} has {values} of {math.prod(whole)} values")
        return blocks

    def _load(self, block: _Block, dtype: torch.dtype) -> Tensor:
        """The tensor of one record, its data mapped."""
        try:
            record = self._file(block.file)[block.start : block.start + block.length]
            # Memory for the data is reserved but never touched.
            with torch.serialization.skip_data():
                header = torch.load(
                    cast(IO[bytes], _Reader(record)), map_location="cpu", weights_only=True
                )
            archive: Any = torch._C.PyTorchFileReader(cast(IO[bytes], _Reader(record)))
            names = [name for name in archive.get_all_records() if name.startswith("data/")]
            place = archive.get_record_offset(_DATA)
        except Exception as error:  # torch's reader of arbitrary bytes may raise anything
            raise self._unreadable(error) from None
        fits = isinstance(header, Tensor) and tuple(header.shape) == block.size
        if not fits or header.dtype != dtype or names != [_DATA]:
            raise self._unreadable(f"{block.file} holds another tensor than its description says")
        data = record[place : place + header.untyped_storage().nbytes()]
        flat = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()  # Megatron's records start anywhere
        whole = flat.view(dtype)
        return whole.as_strided(header.size(), header.stride(), header.storage_offset())

    def _file(self, name: str) -> memoryview:
        if name not in self._mapped:
            with (self.directory / name).open("rb") as file:
                # A private mapping: a tensor over it may be written to, the file stays as it is.
                self._mapped[name] = memoryview(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                )
        return self._mapped[name]

    def _unreadable(self, reason: object) -> InputError:
        text = " ".join(str(reason).split())[:200]
        return InputError(f"{self.directory} cannot be read ({text}); use an earlier checkpoint")


class _Reader(io.RawIOBase):
    """A file over bytes in memory that copies no more of them than are read."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content, self._position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
