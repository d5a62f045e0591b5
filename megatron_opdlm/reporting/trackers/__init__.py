"""Experiment trackers beside the run directory's own files. Rank 0 only.

A tracker is one file, a module with ``open_tracker(run) -> Tracker | None`` (None: the
configuration does not ask for it). TensorBoard and W&B are here; ``logging.trackers`` names others
that Python can import.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_opdlm.configuration.learning import LoggingConfig
from megatron_opdlm.errors import InputError

_OWN = tuple(f"{__name__}.{name}" for name in ("tensorboard", "wandb"))


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run when it opens."""

    directory: Path
    start_step: int  # steps already done; what a tracker has of later ones will come again
    logging: LoggingConfig
    settings: Mapping[str, Any]  # the resolved configuration, flat
    run_id: str | None = None  # at the tracker, as the checkpoint that the run goes on from has it


class Tracker(Protocol):
    """An open page of a run. Its methods return soon: a step waits for them."""

    run_id: str | None  # travels with the checkpoints; None: nothing to remember

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record numbers by tag."""

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Record plain texts by tag. A model wrote them: they can hold anything."""

    def close(self) -> None:
        """The run has ended."""


def open_trackers(run: TrackedRun) -> Sequence[Tracker]:
    """All that the configuration asks for. InputError where one cannot be opened."""
    opened = (_module(name).open_tracker(run) for name in (*_OWN, *run.logging.trackers))
    return [tracker for tracker in opened if tracker is not None]


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"logging.trackers={name} cannot be imported ({error}); name a module that Python "
            "finds, for instance by PYTHONPATH"
        ) from error
    if not hasattr(module, "open_tracker"):
        raise InputError(
            f"logging.trackers={name} has no open_tracker(run); see "
            "megatron_opdlm/reporting/trackers/__init__.py"
        )
    return module
