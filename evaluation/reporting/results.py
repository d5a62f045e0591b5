"""Measured results: summary rows under the name of the model that they belong to."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.reporting.parallelism import Point
from megatron_opdlm import written_values
from megatron_opdlm.errors import InputError

SUMMARY = "summary.json"
THINKING = " think@eval"  # the paper's mark of a model that was asked to think


@dataclass(frozen=True, kw_only=True)
class Result:
    """One summary row."""

    model: str  # name in tables
    row: dict[str, Any]

    @property
    def task(self) -> str:
        return self.row["task"]

    @property
    def is_graded(self) -> bool:
        """Whether it has an accuracy: the scorer of a skipped task was not there."""
        return self.row["accuracy"] is not None

    @property
    def accuracy(self) -> float:
        """From 0 to 1; of graded results only."""
        return self.row["accuracy"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.row["settings"]

    @property
    def is_one_token_a_step(self) -> bool:
        """Whether it was decoded as the paper's tables are: autoregressively, or one token a pass
        in order of confidence.
        """
        settings = self.settings
        if settings.get("mode") == "ar":
            return True
        static = settings.get("remasking") == "low_confidence_static"
        return static and settings["denoising_steps"] >= settings["block_size"]

    @property
    def line(self) -> str:
        """Name of its curve: results that were drawn are no points of one at arg-max."""
        temperature = self.settings.get("temperature") or 0
        return self.model + (f", temperature {temperature:g}" if temperature else "")

    def point(self, measure: str) -> Point | None:
        """Accuracy against ``tokens_per_denoising_step`` or ``tokens_per_forward``; None where that
        was not counted.
        """
        speed = self.row[measure]
        return None if speed is None else Point(accuracy=self.accuracy, parallelism=speed)


def decoding_label(settings: dict[str, Any]) -> str:
    """A short name of the decoding: ``ar``, ``static T=4``, ``dynamic 0.9``; empty if unknown."""
    if not settings.get("mode"):
        return ""
    if settings["mode"] == "ar":
        return "ar"
    name = settings["remasking"].removeprefix("low_confidence_")
    if name == "dynamic":
        return f"dynamic {settings['threshold']:g}"
    if name == "entropy_bounded":
        return f"entropy {settings['entropy_bound']:g}"
    return f"{name} T={settings['denoising_steps']}"


def plain(name: str) -> str:
    """A benchmark's or a model's name without case and punctuation: ``AIME-24`` is ``aime24``."""
    return "".join(character for character in name.lower() if character.isalnum())


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of a summary.json that ``evaluation.run`` or ``evaluation.score`` wrote."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a summary.json written by evaluation.run")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give a summary.json") from error
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise InputError(f"{path}: not a list of summary rows; give a summary.json")
    return rows


_COUNTED = ("accuracy", "stderr", "tokens_per_denoising_step", "tokens_per_forward")
_COUNTED += ("mean_response_tokens", "seconds")


def _is_row(row: object) -> bool:
    """A row as ``reporting.summary`` writes it, with settings that say how it was decoded (or say
    nothing of it)."""
    if not isinstance(row, dict) or not isinstance(row.get("settings"), dict):
        return False
    if not isinstance(row.get("task"), str) or type(row.get("n")) is not int:
        return False
    counted = [row.get(key, "missing") for key in _COUNTED]
    if not all(value is None or type(value) in (int, float) for value in counted):
        return False
    try:
        decoding_label(row["settings"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return isinstance(row["settings"].get("model", ""), str)


def read_results(arguments: Iterable[str]) -> list[Result]:
    """Results of command-line arguments ``[NAME=]PATH``, where a path is a summary.json or a
    directory that holds some, at any depth. Without a name the model's directory gives it.
    """
    results = []
    for argument in arguments:
        try:
            name, path = written_values.named_path(argument)
        except ValueError as error:
            raise InputError(f"{argument} {error}") from error
        for file in _summaries(Path(path)):
            results += [Result(model=name or _own_name(row), row=row) for row in read_summary(file)]
    return [_marked(result) for result in results]


def _summaries(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob(SUMMARY))
    # A sweep's own summary.json repeats those of its points.
    inner = [file for file in found if not any(o.parent in file.parent.parents for o in found)]
    if not found:
        raise InputError(f"{path}: holds no {SUMMARY}; give the --out of evaluation.run")
    return inner or found


def _own_name(row: dict[str, Any]) -> str:
    return Path(row["settings"].get("model", "model")).name


def _marked(result: Result) -> Result:
    if not result.settings.get("enable_thinking") or result.model.endswith("Thinking"):
        return result
    return Result(model=result.model + THINKING, row=result.row)
