"""Reads the tensors of a checkpoint into the layout of this run, and checks its files first: shared
out over the ranks, so that a checkpoint is read for its checksums once, not once a rank.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_opdlm import parallel
from megatron_opdlm.supervision import activity

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import Manifest, check_contents, read_manifest
from megatron_opdlm.storage.safe_metadata import SafeCommon, use_in_megatron

use_in_megatron()


def verify(checkpoint: Path) -> Manifest:
    """Check size and checksum of every file of a checkpoint, all ranks together. InputError on
    every rank where one is damaged.
    """
    problem, manifest = None, None
    try:
        manifest = read_manifest(checkpoint)
        for name in _share(manifest):
            check_contents(checkpoint, manifest, [name])
            activity.advance()
    except (InputError, OSError) as error:
        problem = str(error)
    _agree(problem)
    assert manifest is not None
    return manifest


def _share(manifest: Manifest) -> list[str]:
    """The files that this rank checks: the largest first, each to the rank with least to read."""
    load = [0] * dist.get_world_size()
    mine = []
    for name in sorted(manifest.sha256, key=lambda name: -manifest.files[name]):
        rank = load.index(min(load))
        load[rank] += manifest.files[name]
        if rank == parallel.rank():
            mine.append(name)
    return mine


def load(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Load with every wanted key present; other keys of the directory are left alone.

    Megatron validates on rank 0 alone and would leave the others in a collective, so the index is
    read and names are compared on every rank first.
    """
    _agree(_mismatch(wanted, directory))
    replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        with _without_deprecations():
            loaded = dist_checkpointing.load(
                wanted,
                str(directory),
                FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), replicas),
                SafeCommon(),
            )
    except (CheckpointingException, CheckpointException, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory} does not fit this model ({reason}); use the directory that belongs to it"
        ) from None
    assert isinstance(loaded, dict)
    return loaded


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Megatron loads through names of torch's that are to be replaced; users can do nothing about
    that.
    """
    with warnings.catch_warnings():
        for message in ("`load_state_dict` is deprecated", "Please use DTensor instead"):
            warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        yield


def _mismatch(wanted: dict[str, Any], directory: Path) -> str | None:
    """Why a directory cannot give what is wanted."""
    try:
        stored = set(dist_checkpointing.load_tensors_metadata(str(directory)))
    except (CheckpointingException, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        return f"{directory} cannot be read ({reason}); use an earlier checkpoint or copy it again"
    missing = sorted(_keys(wanted) - stored)
    if not missing:
        return None
    return f"{directory} lacks {', '.join(missing[:3])}; it belongs to another model"


def _agree(problem: str | None) -> None:
    """InputError on every rank where one has found a problem."""
    found = parallel.first_problem(problem)
    if found is not None:
        raise InputError(found)


def _keys(state: Any) -> set[str]:
    if isinstance(state, dict):
        return set().union(*(_keys(value) for value in state.values())) if state else set()
    if isinstance(state, list | tuple):
        return set().union(*(_keys(value) for value in state)) if state else set()
    return {state.key} if isinstance(state, dist_checkpointing.ShardedTensor) else set()
