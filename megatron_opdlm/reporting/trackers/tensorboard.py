"""TensorBoard's files, in ``tensorboard/`` of the run directory."""

from collections.abc import Mapping
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.reporting.trackers import TrackedRun


class TensorBoard:
    """Scalars and texts; a start of the run purges the steps that it does again."""

    run_id = None

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        for tag, text in texts.items():  # as code: the page takes Markdown
            code = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text(tag, code, step)

    def close(self) -> None:
        self._writer.close()


def open_tracker(run: TrackedRun) -> TensorBoard | None:
    if not run.logging.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "logging.tensorboard=true needs the tensorboard package; install it, or use "
            "logging.tensorboard=false"
        ) from error
    directory = str(run.directory / "tensorboard")
    return TensorBoard(SummaryWriter(directory, purge_step=run.start_step + 1))
