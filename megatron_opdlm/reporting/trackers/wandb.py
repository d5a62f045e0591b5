"""Weights & Biases. The run's id is kept in ``wandb/run_id``, and by the checkpoints: a resumed run
goes on in the same page. Steps that it does again have the same values, so it does not matter that
W&B keeps the first ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.writing import write_text
from megatron_opdlm.reporting.trackers import TrackedRun

RUN_ID = Path("wandb") / "run_id"


class Wandb:
    """An open W&B run; it sends in the background."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.run_id: str | None = run.id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        import wandb

        rows: list[Any] = [[step, tag, text] for tag, text in texts.items()]
        self._run.log({"samples": wandb.Table(columns=["step", "sample", "text"], data=rows)})

    def close(self) -> None:
        self._run.finish()


def open_tracker(run: TrackedRun) -> Wandb | None:
    """Start or continue the run's page.

    An offline run is written below ``wandb/`` of the run directory and sent by ``wandb sync``
    whenever there is a network. InputError where the package or, online, the account is missing.
    """
    keys = run.logging
    if keys.wandb == "none":
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"logging.wandb={keys.wandb} needs the wandb package; install the project's extra "
            "'tracking', or use logging.wandb=none"
        ) from error
    kept = run.directory / RUN_ID
    known = (kept.read_text().strip() if kept.is_file() else "") or run.run_id
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        page = wandb.init(
            project=keys.wandb_project,
            entity=keys.wandb_entity or None,
            group=keys.wandb_group or None,
            name=keys.wandb_name or run.directory.resolve().name,
            tags=keys.wandb_tags or None,
            dir=str(run.directory),
            id=known,
            resume="allow",
            mode=keys.wandb,
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.UsageError as error:  # pyright: ignore[reportAttributeAccessIssue]
        reason = str(error).splitlines()[0]
        raise InputError(
            f"logging.wandb={keys.wandb}: {reason}; log in with 'wandb login' or WANDB_API_KEY, or "
            "use logging.wandb=offline"
        ) from error
    write_text(kept, page.id + "\n")
    return Wandb(page)
