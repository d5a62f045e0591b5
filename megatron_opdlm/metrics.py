"""Final numbers of a step -> ``metrics.jsonl``, trackers and a progress bar; rank 0 only.

Nothing is reduced here: the numbers come in as they are to be reported. On resume, lines of steps
after ``start_step`` are removed, so every step appears once.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_opdlm.errors import RunError
from megatron_opdlm.model_files.writing import append_jsonl, json_line, write_bytes
from megatron_opdlm.reporting.progress import Progress
from megatron_opdlm.reporting.sample_texts import trajectory_text
from megatron_opdlm.reporting.trackers import Tracker

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVALUATION = "evaluation.jsonl"
_BAR = {  # metric -> its short name on the progress bar
    "loss": "loss",
    "kl": "KL",
    "trained_tokens_per_second": "tok/s",
    "max_new_tokens": "length",
}


class MetricsWriter:
    """Writes the records of a run. With ``enabled`` false (other ranks) every call does nothing."""

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        total_steps: int,
        start_step: int,  # steps already done; 0 for a new run
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._run_dir = run_dir
        self._enabled = enabled
        self._said: set[str] = set()
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES, EVALUATION):
            forget_after(run_dir / name, start_step)
        self._trackers = trackers
        self._bar = Progress("train", total_steps, start_step, show=True, unit="step")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one training step: one line, on disk when this returns."""
        if not self._enabled:
            return
        append_jsonl(self._run_dir / METRICS, [{"step": step, **metrics}])
        self._show(step, metrics)
        self._bar.advance(note=_note(metrics))

    def say_once(self, note: str) -> None:
        """A line for people above the progress bar, unless this run has said it."""
        if self._enabled and note not in self._said:
            self._said.add(note)
            tqdm.write(f"note: {note}", file=sys.stderr)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Record sample texts of one step, one line each, and for the trackers as text."""
        if not self._enabled:
            return
        append_jsonl(self._run_dir / SAMPLES, [{"step": step, **sample} for sample in samples])
        for tracker in self._trackers:
            tracker.texts(
                step, {f"samples/{i}": trajectory_text(row) for i, row in enumerate(samples)}
            )

    def evaluation(self, step: int, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Record an evaluation of the student after a step: ``record`` as a line of its own file,
        ``metrics`` in the step's line, if it has one (step 0 has none), and for the trackers.
        """
        if not self._enabled:
            return
        append_jsonl(self._run_dir / EVALUATION, [{"step": step, **record}])
        _amend_last(self._run_dir / METRICS, step, metrics)
        self._show(step, metrics)

    def _show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers for the trackers."""
        numbers = dict(scalars(metrics))
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def close(self) -> None:
        if not self._enabled:
            return
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut short; atomic. RunError for a
    line that is damaged otherwise: what it held cannot be made again.
    """
    if not file.exists():
        return
    lines = enumerate(file.read_bytes().splitlines(keepends=True), start=1)
    kept = [line for number, line in lines if _is_of(file, number, line, step)]
    write_bytes(file, b"".join(kept))


def _amend_last(file: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """Add keys to the last line if it is that step's; atomic."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    if last.get("step") != step:
        return
    write_bytes(file, b"".join(lines[:-1]) + json_line({**last, **metrics}))


def _is_of(file: Path, number: int, line: bytes, last_step: int) -> bool:
    """The line is whole and its step is not later."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{file} line {number} is damaged; restore the file or remove that line, and start the "
            "same command again"
        ) from None


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by tag; entries of mappings and lists are ``name/key`` and ``name/position``."""
    for name, value in metrics.items():
        tag = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{tag}/")
        elif isinstance(value, (list, tuple)):
            yield from scalars({str(i): item for i, item in enumerate(value)}, f"{tag}/")
        elif isinstance(value, (int, float)):
            yield tag, float(value)


def _note(metrics: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{short}={metrics[name]:.4g}"
        for name, short in _BAR.items()
        if isinstance(metrics.get(name), (int, float))
    )
