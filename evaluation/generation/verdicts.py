"""Grading part by part: how far it is, and what a kill does not take."""

import time
from dataclasses import asdict
from pathlib import Path

from evaluation.generation.identity import hash_rows
from evaluation.generation.predictions import SETTINGS, VERDICTS, whole_lines
from evaluation.graded import grade_predictions
from evaluation.tasks import Grade, Row, Task
from megatron_opdlm.model_files.writing import append_jsonl, write_json
from megatron_opdlm.reporting.progress import Progress

FIRST_PART, PART_SECONDS = 32, 20.0  # problems graded, then seconds' worth, before they are kept


class Verdicts:
    """The grades of one task under way; with a directory, a line of its ``graded.partial.jsonl``
    for each problem, which an earlier attempt's are read from. Nothing is there before the first
    verdicts. They hold for the responses, and the sandbox, that they were found with.
    """

    def __init__(self, task: Task, out: Path | None, settings: Row | None = None) -> None:
        """``settings``: what ``settings.json`` is to hold from the first verdicts on, where it is
        not there already. InputError: the file holds what are no verdicts.
        """
        self._out, self._settings = out, settings
        self._circumstances = [task.name, sandbox_layers(task)]
        self._grades: dict[str, list[Grade]] = {}
        self.seconds = 0.0  # of grading, over all attempts
        for row in whole_lines(out / VERDICTS, _is_verdict, _NO_VERDICT) if out else ():
            self._grades[row["of"]] = [Grade(**grade) for grade in row["grades"]]
            self.seconds = row["seconds"] if row["task"] == task.name else self.seconds

    def __contains__(self, prediction: Row) -> bool:
        return self._key(prediction) in self._grades

    def __getitem__(self, prediction: Row) -> list[Grade]:
        return self._grades[self._key(prediction)]

    def add(self, predictions: list[Row], grades: list[list[Grade]], seconds: float) -> None:
        """More problems are graded, which took this long. They are on disk afterwards."""
        self.seconds += seconds
        new = dict(zip(map(self._key, predictions), grades, strict=True))
        self._grades |= new
        if self._out is None:
            return
        if self._settings is not None and not (self._out / SETTINGS).is_file():
            self._out.mkdir(parents=True, exist_ok=True)
            write_json(self._out / SETTINGS, self._settings)
        common = {"task": self._circumstances[0], "seconds": self.seconds}
        rows = [
            {"of": key, "grades": [asdict(grade) for grade in own], **common}
            for key, own in new.items()
        ]
        append_jsonl(self._out / VERDICTS, rows)

    def discard(self) -> None:
        """They are elsewhere now."""
        if self._out is not None:
            (self._out / VERDICTS).unlink(missing_ok=True)

    def _key(self, prediction: Row) -> str:
        made = [prediction[name] for name in ("index", "responses")]
        return hash_rows([*self._circumstances, *made, prediction.get("finish_reason")])


def sandbox_layers(task: Task) -> list[str] | None:
    """Those that its programs are confined by; None: it runs none."""
    return task.settings().get("sandbox", {}).get("layers")


_NO_VERDICT = "not a verdict of an evaluation; remove the line, and its problem is graded again"


def _is_verdict(row: object) -> bool:
    return isinstance(row, dict) and {"task", "of", "grades", "seconds"} <= row.keys()


def grade_in_parts(
    task: Task, rows: list[Row], predictions: list[Row], verdicts: Verdicts, *, show: bool
) -> list[list[Grade]]:
    """``grade_predictions`` of what has no verdict yet, kept part by part: a part takes about as
    long as a user would like to lose, and is large enough to fill the cores.
    """
    pairs = list(zip(rows, predictions, strict=True))
    left = [pair for pair in pairs if pair[1] not in verdicts]
    total, missing = (sum(len(given["responses"]) for _, given in some) for some in (pairs, left))
    size = FIRST_PART
    with Progress(f"{task.name}, graded", total, total - missing, show=show) as progress:
        while left:
            part, left = left[:size], left[size:]
            start = time.monotonic()
            given = [prediction for _, prediction in part]
            grades = grade_predictions(task, [row for row, _ in part], given)
            seconds = time.monotonic() - start
            verdicts.add(given, grades, seconds)
            progress.advance(count=sum(map(len, grades)))
            wanted = int(size * PART_SECONDS / max(seconds, 1e-6))
            size = min(max(wanted, FIRST_PART), 4 * size)
    return [verdicts[prediction] for prediction in predictions]
