"""Weights & Biases beside the run directory's own files. Rank 0 only.

The run's id is kept in ``wandb/run_id``: a resumed run goes on in the same page. Steps that a
resumed run does again have the same values, so it does not matter that W&B keeps the first ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.writing import write_text

RUN_ID = Path("wandb") / "run_id"


class Tracker:
    """An open W&B run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def run_id(self) -> str:
        return self._run.id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record numbers by tag; returns at once, W&B sends in the background."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def open_tracker(
    run_dir: Path,
    *,
    mode: str,  # "none" | "offline" | "online"
    project: str,
    settings: Mapping[str, Any],  # the resolved configuration, flat
    run_id: str | None = None,  # as a checkpoint has it
) -> Tracker | None:
    """Start or continue the run's page; None with ``mode`` "none".

    An offline run is written below ``run_dir/wandb`` and sent by ``wandb sync`` whenever there is a
    network. InputError where the package or, online, the account is missing.
    """
    if mode == "none":
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"logging.wandb={mode} needs the wandb package; install the project's extra "
            "'tracking', or use logging.wandb=none"
        ) from error
    kept = run_dir / RUN_ID
    known = (kept.read_text().strip() if kept.is_file() else "") or run_id
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            dir=str(run_dir),
            id=known,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.UsageError as error:  # pyright: ignore[reportAttributeAccessIssue]
        reason = str(error).splitlines()[0]
        raise InputError(
            f"logging.wandb={mode}: {reason}; log in with 'wandb login' or WANDB_API_KEY, or use "
            "logging.wandb=offline"
        ) from error
    write_text(kept, run.id + "\n")
    return Tracker(run)
