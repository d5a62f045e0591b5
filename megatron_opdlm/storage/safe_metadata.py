"""Reads torch's distributed checkpoints without running code from them.

The format keeps its index, ``.metadata``, as a pickle, and torch reads it with plain ``pickle``,
which runs whatever the file says. Here it is read with an unpickler that knows the index's own
classes and nothing else. ``common.pt`` and the tensors are torch archives, loaded with
``weights_only``. Call ``use_in_megatron`` once before Megatron loads anything.
"""

import enum
import os
import pickle
from pathlib import Path
from typing import Any

import torch

import megatron_opdlm.hardware  # noqa: F401 -- makes Megatron usable on this machine

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

INDEX = ".metadata"
COMMON = "common.pt"
# Data classes and enums of the index; Megatron keeps the ranks' save plans in it, too.
_CLASSES = {
    metadata.__name__: (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    planner.__name__: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    filesystem.__name__: ("_StorageInfo", "_StoragePrefix"),
    "collections": ("OrderedDict",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),  # name -> torch.strided and its like
}


class UnsafeContent(CheckpointingException):
    """A checkpoint file asks for something that no checkpoint of ours holds."""


class _IndexUnpickler(pickle.Unpickler):
    """Finds the classes of ``_CLASSES``, element types, and members of those enums."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 write an enum
            return _enum_member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeContent(f"it asks for {module}.{name}, which no index of tensors needs")


def _enum_member(owner: Any, name: Any) -> Any:
    if isinstance(owner, enum.EnumType) and name in owner.__members__:
        return owner[name]
    raise UnsafeContent(f"it asks for the attribute {name!r} of {owner!r}")


def read_metadata(weights: Path) -> Metadata:
    """The index of a torch_dist directory. CheckpointingException where it is damaged or unsafe;
    OSError where it cannot be read.
    """
    with (weights / INDEX).open("rb") as stream:
        try:
            found = _IndexUnpickler(stream).load()
        except CheckpointingException as error:
            raise UnsafeContent(f"{weights / INDEX} is refused: {error}") from None
        except Exception as error:  # a pickle of arbitrary bytes may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointingException(f"{weights / INDEX} is damaged ({reason})") from None
    tensors = getattr(found, "state_dict_metadata", None)
    places = getattr(found, "storage_data", None) or {}
    if not isinstance(found, Metadata) or not all(isinstance(d, dict) for d in (tensors, places)):
        raise CheckpointingException(f"{weights / INDEX} is damaged (no index of tensors)")
    for key, place in places.items():
        if not isinstance(getattr(key, "fqn", None), str):
            raise CheckpointingException(f"{weights / INDEX} is damaged (a place of no tensor)")
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise UnsafeContent(f"{weights / INDEX} is refused: it reads from {name!r}")
        if getattr(place, "transform_descriptors", None):
            raise UnsafeContent(f"{weights / INDEX} is refused: it decodes {name!r}")
    return found


def read_common(weights: Path) -> dict[str, Any]:
    """What is not split over ranks (``common.pt``). CheckpointingException where it is damaged or
    holds anything but tensors, numbers, strings and containers.
    """
    try:
        return torch.load(weights / COMMON, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointingException(f"{weights / COMMON} is refused: {reason}") from None


class SafeReader(FileSystemReader):
    """torch's reader of a distributed checkpoint; the index is read once, by ``read_metadata``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, with the reader's own mark in it as torch wants."""
        if self._index is None:
            self._index = read_metadata(Path(self.path))
            if getattr(self._index, "storage_meta", None) is None:
                self._index.storage_meta = StorageMeta()
            assert self._index.storage_meta is not None
            self._index.storage_meta.load_id = self.load_id
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Tensors only: torch unpickles other objects without restriction."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise UnsafeContent(f"{self.path}: {item.storage_index.fqn} is no tensor")
        return super().read_data(plan, planner)


class SafeCommon(TorchCommonLoadStrategy):
    """Megatron's reader of ``common.pt``, which leaves the restriction to torch's default."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """``read_common``."""
        return read_common(Path(checkpoint_dir))


def use_in_megatron() -> None:
    """Every load through Megatron reads the index with ``SafeReader``."""
    name = "_get_filesystem_reader"
    assert hasattr(megatron_torch, name), "Megatron has another way to open a checkpoint"
    setattr(megatron_torch, name, _open_reader)


def _open_reader(directory: str | os.PathLike[str], cache_metadata: bool = False) -> SafeReader:
    """Stands in for Megatron's own; the index is read once in any case."""
    return SafeReader(directory)
