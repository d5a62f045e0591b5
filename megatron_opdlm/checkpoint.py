"""Saving and resuming: Megatron distributed checkpoints, published atomically, loadable at any TP,
PP and DP.

A checkpoint directory holds ``weights/`` (torch_dist), ``huggingface/`` (config, tokenizer,
generation config), ``state.json`` and ``config.yaml`` (training only) and, written last,
``manifest.json`` with the size of every file. It gets its final name when it is complete; a save
that was cut short is a directory that no reader accepts.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm import parallel

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from checkpoint_tools.hf_files import carry_over
from checkpoint_tools.manifest import (
    BlockContract,
    LowRank,
    is_checkpoint,
    read_manifest,
    write_manifest,
)
from checkpoint_tools.publish import publish
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model import lora
from megatron_opdlm.model.qwen3 import Qwen3, load_hf
from megatron_opdlm.update import Student

WEIGHTS, HUGGINGFACE, STATE, CONFIG, LATEST = (
    "weights",
    "huggingface",
    "state.json",
    "config.yaml",
    "latest",
)
_EXTRA_STATE = "_extra_state"
_PREFIX = "model."  # of the weights' keys, in imported and in training checkpoints alike


def _metadata() -> dict[str, Any]:
    """How Megatron lays out optimizer state so that any other parallel layout can read it.

    A new dictionary each time: Megatron adds the process group of the moment to it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run has done. All else (data order, schedules, random numbers) is a pure function of
    the step and the seed.
    """

    step: int = 0  # steps done
    cumulative_trained_tokens: int = 0
    cumulative_rollout_tokens: int = 0
    cumulative_flops: float = 0.0
    cumulative_flops_paper: float = 0.0


def huggingface_dir(model_dir: Path) -> Path:
    """Where a model directory keeps its Hugging Face files: itself or ``huggingface/``."""
    return model_dir / HUGGINGFACE if is_checkpoint(model_dir) else model_dir


def load_model(model: Qwen3, model_dir: Path) -> None:
    """Fill a model from a Hugging Face directory or a Megatron checkpoint of either kind.

    A checkpoint's low-rank terms are merged into the weights of a model that has none, and go on
    where the model has the same; terms that no file holds stay as they are.
    """
    if not is_checkpoint(model_dir):
        load_hf(model, model_dir)
        return
    stored, own = read_manifest(model_dir).low_rank, lora.adapters_of(model)
    if stored is not None and own is not None and own.low_rank != stored:
        raise InputError(
            f"{model_dir} holds low-rank terms of {stored}, but lora.* asks for {own.low_rank}; "
            "use its values, or export it and start from the merged weights"
        )
    if stored is not None and own is None:
        lora.attach(model, stored, seed=0)
        load_weights(model, model_dir / WEIGHTS)
        lora.merge(model)
    else:
        load_weights(model, model_dir / WEIGHTS, low_rank=stored is not None)


def save_weights(model: Qwen3, directory: Path) -> None:
    """Write the weights as a torch_dist checkpoint into a new directory, all ranks together."""
    _save({"model": _weights(model)}, directory)


def load_weights(model: Qwen3, directory: Path, *, low_rank: bool = True) -> None:
    """Fill a model from the ``weights/`` of a checkpoint, whatever layout wrote it. ``low_rank``
    False: the checkpoint has no low-rank terms, and those of the model stay.
    """
    state = _weights(model)
    kept = {}
    if not low_rank:
        kept = {k: v for k, v in model.state_dict().items() if k.startswith(f"{lora.NAME}.")}
        state = {k: v for k, v in state.items() if k.removeprefix(_PREFIX) not in kept}
    loaded = _load({"model": state}, directory, strict_prefix=_PREFIX)
    _fill(model, loaded["model"], kept)


def _weights(model: Qwen3) -> dict[str, Any]:
    """The weights as Megatron stores them. Layers of either spec have the same: Megatron's own are
    stored under the names of Transformer Engine's, whose "extra state" (scales of FP8 products,
    which we do not compute) is left out.
    """
    state = model.sharded_state_dict(prefix=_PREFIX, metadata=_metadata())
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def _fill(model: Qwen3, loaded: dict[str, Any], kept: dict[str, Any]) -> None:
    """Give a model what ``_weights`` asked for, and the values in ``kept``."""
    values = {name.removeprefix(_PREFIX): value for name, value in loaded.items()}
    problems = model.load_state_dict(kept | values, strict=False)
    missing = [name for name in problems.missing_keys if not name.endswith(_EXTRA_STATE)]
    assert not missing and not problems.unexpected_keys, problems


def _save(state: dict[str, Any], directory: Path) -> None:
    if parallel.is_writer():
        directory.mkdir(parents=True)
    parallel.barrier()
    dist_checkpointing.save(state, str(directory), content_metadata=_metadata())


def _load(wanted: dict[str, Any], directory: Path, *, strict_prefix: str) -> dict[str, Any]:
    """Load with every wanted key present; keys that we do not ask for are fine only outside
    ``strict_prefix``.

    Megatron validates on rank 0 alone and would leave the others in a collective, so names are
    compared on every rank first.
    """
    try:
        stored = set(dist_checkpointing.load_tensors_metadata(str(directory)))
    except (CheckpointingException, OSError, EOFError) as error:
        raise InputError(
            f"{directory} cannot be read ({error}); use an earlier checkpoint or copy it again"
        ) from None
    asked = _keys(wanted)
    missing = sorted(key for key in asked if key not in stored)
    if not parallel.all_succeeded(not missing):
        raise InputError(
            f"{directory} lacks {', '.join(missing[:3]) or 'a tensor'}; it belongs to another model"
        )
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except (CheckpointingException, EOFError) as error:
        raise InputError(
            f"{directory} does not fit this model ({error}); use the directory that belongs to it"
        ) from None
    assert isinstance(loaded, dict)
    return loaded


def _keys(state: Any) -> set[str]:
    if isinstance(state, dict):
        return set().union(*(_keys(value) for value in state.values())) if state else set()
    if isinstance(state, list | tuple):
        return set().union(*(_keys(value) for value in state)) if state else set()
    return {state.key} if isinstance(state, dist_checkpointing.ShardedTensor) else set()


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The ``checkpoints/`` of one run directory."""

    directory: Path
    keep: int
    source: Path  # Hugging Face files that travel with the weights
    config_yaml: str
    dtype: str  # "fp32" | "bf16"
    block_contract: BlockContract
    low_rank: LowRank | None = None  # terms that the student has beside its weights

    def save(self, student: Student, progress: Progress) -> Path:
        """Write and publish ``step_NNNNNNN``; older ones beyond ``keep`` are removed afterwards."""
        final = self.directory / f"step_{progress.step:07d}"
        temporary = self.directory / f".{final.name}.tmp"
        self._on_writer(lambda: self._start(temporary))
        _save(_training_state(student), temporary / WEIGHTS)
        parallel.barrier()
        self._on_writer(lambda: self._finish(temporary, final, progress))
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Raises InputError where ``latest`` names a
        damaged one.
        """
        pointer = self.directory / LATEST
        if not pointer.is_file():
            return None
        checkpoint = self.directory / pointer.read_text().strip()
        read_manifest(checkpoint)
        return checkpoint

    def restore(self, student: Student, checkpoint: Path) -> Progress:
        """Fill weights and optimizer from a training checkpoint and return what had been done."""
        wanted = _training_state(student, is_loading=True)
        loaded = _load(wanted, checkpoint / WEIGHTS, strict_prefix=_PREFIX)
        _fill(student.model, loaded["model"], {})
        student.optimizer.load_state_dict(loaded["optimizer"])
        return Progress(**json.loads((checkpoint / STATE).read_text()))

    def _start(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(".step_*.tmp"):  # left by a save that was killed
            shutil.rmtree(stale)
        temporary.mkdir()
        carry_over(self.source, temporary / HUGGINGFACE)
        (temporary / CONFIG).write_text(self.config_yaml)

    def _finish(self, temporary: Path, final: Path, progress: Progress) -> None:
        (temporary / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        write_manifest(
            temporary,
            kind="training",
            dtype=self.dtype,
            block_contract=self.block_contract,
            step=progress.step,
            low_rank=self.low_rank,
        )
        if final.exists():  # a run that went back to an earlier checkpoint comes by again
            shutil.rmtree(final)
        publish(temporary, final)
        replace_text(self.directory / LATEST, final.name + "\n")
        for old in sorted(self.directory.glob("step_*"))[: -self.keep]:
            shutil.rmtree(old)

    def _on_writer(self, action: Callable[[], None]) -> None:
        """Run file operations on rank 0; a failure there ends all ranks instead of leaving them in
        a collective.
        """
        problem: OSError | None = None
        if parallel.is_writer():
            try:
                action()
            except OSError as error:
                problem = error
        if not parallel.all_succeeded(problem is None):
            raise RunError(
                f"{self.directory}: checkpoint not written ({problem or 'rank 0 failed'}); "
                "earlier ones are untouched"
            )


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new content, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _training_state(student: Student, *, is_loading: bool = False) -> dict[str, Any]:
    model = _weights(student.model)
    with _positions_without_padding(student):
        optimizer = student.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=_metadata()
        )
    return {"model": model, "optimizer": optimizer}


@contextmanager
def _positions_without_padding(student: Student) -> Iterator[None]:
    """Correct where Megatron cuts parameters out of the gathered optimizer state.

    Megatron (0.16) gathers it without the padding between gradient buckets, but slices it at the
    positions with padding, so parameters after a padded bucket get their neighbours' state. It
    happens where there are several buckets: a tied embedding has its own on a later pipeline stage.
    """
    buffers: Any = student.ddp.buffers  # Megatron's list hides PyTorch's method of that name
    original = [(buffer, buffer.param_index_map) for buffer in buffers]
    for buffer, positions in original:
        padding = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
        before = list(itertools.accumulate(padding, initial=0))
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in positions.items()
        }
    try:
        yield
    finally:
        for buffer, positions in original:
            buffer.param_index_map = positions


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a weight type."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
