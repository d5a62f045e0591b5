"""Saving and resuming: Megatron distributed checkpoints, written while the run goes on, published
atomically, loadable at any TP, PP and DP.

A checkpoint directory holds ``weights/`` (torch_dist), ``huggingface/`` (config, tokenizer,
generation config), ``state.json`` and ``config.yaml`` (training only) and, written last,
``manifest.json`` with size and checksum of every file. It gets its final name when it is complete;
a save that was cut short is a directory that no reader accepts.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from megatron_opdlm import parallel
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model import lora
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.weights import load_hf
from megatron_opdlm.model_files.huggingface_files import carry_over
from megatron_opdlm.model_files.manifest import (
    CONFIG,
    HUGGINGFACE,
    WEIGHTS,
    BlockContract,
    LowRank,
    is_checkpoint,
    write_manifest,
)
from megatron_opdlm.model_files.writing import publish
from megatron_opdlm.storage.model_state import (
    PREFIX,
    fill,
    layout_metadata,
    restore_optimizer,
    training_state,
    weights_state,
)
from megatron_opdlm.storage.run_state import Progress, RunIdentity, read_state, write_state
from megatron_opdlm.storage.sharded_load import load, verify
from megatron_opdlm.storage.sharded_save import HostCopies, ShardedSave, Written
from megatron_opdlm.storage.step_directories import (
    BEST,
    LATEST,
    StepDirectories,
    is_name,
    name_of,
    step_of,
)
from megatron_opdlm.update import Student


def load_model(model: LanguageModel, model_dir: Path) -> None:
    """Fill a model from a Hugging Face directory or a Megatron checkpoint of either kind.

    A checkpoint's low-rank terms are merged into the weights of a model that has none, and go on
    where the model has the same; terms that no file holds stay as they are.
    """
    if not is_checkpoint(model_dir):
        load_hf(model, model_dir)
        return
    stored, own = verify(model_dir).low_rank, lora.adapters_of(model)
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


def save_weights(model: LanguageModel, directory: Path) -> None:
    """Write the weights as a torch_dist checkpoint into a new directory, all ranks together."""
    _on_writer(directory, lambda: directory.mkdir(parents=True))
    save = ShardedSave({"model": weights_state(model)}, directory, content=layout_metadata())
    written = save.finish()
    _on_writer(directory, lambda: save.write_index(written))


def load_weights(model: LanguageModel, directory: Path, *, low_rank: bool = True) -> None:
    """Fill a model from the ``weights/`` of a checkpoint, whatever layout wrote it. ``low_rank``
    False: the checkpoint has no low-rank terms, and those of the model stay.
    """
    state = weights_state(model)
    kept = {}
    if not low_rank:
        kept = {k: v for k, v in model.state_dict().items() if k.startswith(f"{lora.NAME}.")}
        state = {k: v for k, v in state.items() if k.removeprefix(PREFIX) not in kept}
    fill(model, load({"model": state}, directory)["model"], kept)


def _on_writer(what: Path, action: Callable[[], None]) -> None:
    """Run file operations on rank 0; a failure there ends all ranks instead of leaving them in a
    collective.
    """
    problem = parallel.on_writer(action)
    if problem is not None:
        raise RunError(f"{what} not written: {problem}")


@dataclass(kw_only=True)
class _Pending:
    """A save whose files are being written."""

    save: ShardedSave
    progress: Progress


@dataclass(kw_only=True)
class Checkpoints:
    """The ``checkpoints/`` of one run directory. All ranks call its methods together."""

    directory: Path
    keep: int
    source: Path  # Hugging Face files that travel with the weights
    config_yaml: str
    dtype: str  # "fp32" | "bf16"
    block_contract: BlockContract
    low_rank: LowRank | None = None  # terms that the student has beside its weights
    in_background: bool = False  # write while the run goes on, from copies in host memory
    identity: RunIdentity | None = None
    best_step: int | None = None  # whose checkpoint ``best`` names once it is published
    in_use: str | None = None  # name of a checkpoint that is being read, which is not removed
    tracker_run_id: str | None = None  # of an experiment tracker, which may set it; saved, restored
    _copies: HostCopies = field(default_factory=HostCopies)
    _pending: _Pending | None = None

    @property
    def places(self) -> StepDirectories:
        """What lies where; rank 0 changes it."""
        return StepDirectories(directory=self.directory, identity=self.identity)

    def save(self, student: Student, progress: Progress) -> None:
        """Begin to write ``step_NNNNNNN``; it is published by ``poll`` or ``finish``. An earlier
        save is finished first.
        """
        self.finish()
        temporary = self.places.under_way(progress.step)
        self._write(progress.step, lambda: self._start(temporary))
        copies = self._copies if self.in_background else None
        self._pending = _Pending(save=_save(student, temporary, copies), progress=progress)
        if not self.in_background:
            self.finish()

    def poll(self) -> None:
        """Publish the save under way if all ranks have written their files."""
        if self._pending is not None and parallel.all_succeeded(self._pending.save.done):
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and publish it; older checkpoints beyond
        ``keep`` are removed afterwards. RunError where it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step = pending.progress.step
        try:
            written = pending.save.finish()
        except RunError as error:
            self._give_up(step, str(error))
        self._write(step, lambda: self._publish(pending, written))

    def has(self, step: int) -> bool:
        """Whether a step's checkpoint is published."""
        return self.places.has(step)

    def mark_best(self, step: int | None) -> None:
        """Let ``best`` name this step's checkpoint, now or when it is published: ``keep`` spares
        it. None: no step is the best.
        """
        self.best_step = step
        if step is None:
            _on_writer(self.directory, lambda: (self.directory / BEST).unlink(missing_ok=True))
        else:
            _on_writer(self.directory, self._point_to_best)

    def latest(self) -> Path | None:
        """The checkpoint to go on from, checked, or None: there is none. Raises InputError where
        it is damaged, and says which earlier one is whole and how to go on from it, and where
        something else has a name that the run needs.
        """
        name = self._chosen()
        if name is None:
            return None
        try:
            if not is_name(name):
                raise InputError(f"{self.directory / LATEST} holds {name!r}, which names nothing")
            verify(self.directory / name)
        except InputError as error:
            raise InputError(f"{error}; {self._way_out(name)}") from None
        return self.directory / name

    def _chosen(self) -> str | None:
        """What rank 0 finds to go on from, on every rank."""
        found: tuple[str | None, str | None] = None, None
        if parallel.is_writer():
            try:
                found = self.places.start(), None
            except (InputError, OSError) as error:
                found = None, str(error)
        name, problem = parallel.broadcast_object(found)
        if problem is not None:
            raise InputError(problem)
        if name is not None and parallel.is_writer() and self.places.pointed_to(LATEST) is None:
            print(
                f"note: {self.directory / LATEST} is missing; going on from {name}, the newest "
                "checkpoint of this run",
                file=sys.stderr,
                flush=True,
            )
        return name

    def restore(self, student: Student, checkpoint: Path) -> Progress:
        """Fill weights and optimizer from a training checkpoint and return what had been done."""
        progress, self.tracker_run_id = read_state(checkpoint, self.identity)
        loaded = load(training_state(student, is_loading=True), checkpoint / WEIGHTS)
        fill(student.model, loaded["model"], {})
        restore_optimizer(student, loaded["optimizer"])
        return progress

    def _way_out(self, damaged: str) -> str:
        """The newest other checkpoint that is whole, found by all ranks together."""
        names = parallel.broadcast_object(self.places.own())
        for name in reversed([name for name in names if name != damaged]):
            try:
                verify(self.directory / name)
            except InputError:
                continue
            return (
                f"{name} is whole: to go on from it, write its name into {self.directory / LATEST}"
            )
        return "no other checkpoint of this run is whole; start again in another train.out"

    def _start(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.places.discard_leftovers()
        temporary.mkdir()
        carry_over(self.source, temporary / HUGGINGFACE)
        (temporary / CONFIG).write_text(self.config_yaml)
        (temporary / WEIGHTS).mkdir()

    def _publish(self, pending: _Pending, written: list[Written]) -> None:
        step = pending.progress.step
        temporary = self.places.under_way(step)
        pending.save.write_index(written)
        write_state(temporary, pending.progress, self.identity, self.tracker_run_id)
        for file in written:
            found = (temporary / WEIGHTS / file.name).stat().st_size
            if found != file.bytes:
                raise OSError(f"{file.name} has {found} bytes, {file.bytes} were written")
        write_manifest(
            temporary,
            kind="training",
            dtype=self.dtype,
            block_contract=self.block_contract,
            step=step,
            low_rank=self.low_rank,
            sha256={f"{WEIGHTS}/{file.name}": file.sha256 for file in written},
        )
        self.places.make_room(step)
        publish(temporary, self.places.of(step))
        self.places.point(LATEST, step)
        self._point_to_best()
        self.places.keep(self.keep, newest=step, spared=self.in_use)

    def latest_step(self) -> int:
        """Of the checkpoint that ``latest`` names, as rank 0 sees it; 0: there is none."""
        name = self.places.pointed_to(LATEST)
        return step_of(name) if name and is_name(name) else 0

    def keep_to_number(self) -> None:
        """Remove what was spared while it was in use; on rank 0."""
        self.places.keep(self.keep, newest=self.latest_step(), spared=self.in_use)

    def _point_to_best(self) -> None:
        """``best`` names the best step's checkpoint once that is there; until then, the one before
        it.
        """
        step, places = self.best_step, self.places
        if step is not None and places.has(step) and places.pointed_to(BEST) != name_of(step):
            places.point(BEST, step)

    def _write(self, step: int, action: Callable[[], None]) -> None:
        """File operations of a save, on rank 0."""
        try:
            _on_writer(self.directory, action)
        except RunError as error:
            self._give_up(step, str(error))

    def _give_up(self, step: int, reason: str) -> NoReturn:
        """A save has failed: make room, name what is left."""
        if parallel.is_writer():
            shutil.rmtree(self.places.under_way(step), ignore_errors=True)
        name, left = self.places.pointed_to(LATEST), "there is no earlier one"
        if name:
            left = f"{name} is untouched and the same command goes on from it"
        raise RunError(
            f"{self.directory}: checkpoint of step {step} not written ({reason}); {left}"
        ) from None


def _save(student: Student, temporary: Path, copies: HostCopies | None) -> ShardedSave:
    return ShardedSave(
        training_state(student), temporary / WEIGHTS, content=layout_metadata(), copies=copies
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a weight type."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
