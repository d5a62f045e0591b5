"""Grade responses that were generated anywhere.

Predictions: one object a line, ``{"index": row in the task's data file from 0, "responses": ["...",
...]}``. Rows may be missing; the score is over those given. Rows with a ``task`` key of another
task are passed over, so that the predictions.jsonl of ``evaluation.run`` can be graded again.
A row may hold ``finish_reason``, a list with "stop" or "length" (ran into the limit) for each
response. Writes ``summary.json`` and ``graded.jsonl`` into --out, whole, at the end; the same
command goes on where it was killed. An --out with other predictions, other data or another sandbox
is refused.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

from evaluation.generation.identity import hash_rows
from evaluation.generation.predictions import SETTINGS, finished_rows, whole_lines
from evaluation.graded import grade_predictions, graded_row, summary_of, tell_scorer_errors
from evaluation.jail.sandbox import use_sandbox
from evaluation.jsonl import read_jsonl
from evaluation.report import table
from evaluation.reporting.results import SUMMARY
from evaluation.reporting.summary import SummaryRow
from evaluation.sandbox_flag import add_sandbox_flag
from evaluation.tasks import Grade, Row, Task, get_task
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import append_jsonl, write_json, write_jsonl
from megatron_opdlm.reporting.progress import Progress

GRADED, PARTIAL = "graded.jsonl", "graded.partial.jsonl"
FIRST_PART, PART_SECONDS = 32, 20.0  # problems graded, then seconds' worth, before they are kept


def read_predictions(path: Path, task: Task, problems: int) -> list[Row]:
    """The predictions of one task, checked against its number of problems.

    InputError: file, index, rule, remedy.
    """
    rows = [
        row
        for row in read_jsonl(path, "--predictions")
        if task.is_called(row.get("task", task.name))
    ]
    if not rows:
        raise InputError(f"--predictions {path}: no rows of task {task.name}; check --task")
    seen: set[int] = set()
    for number, row in enumerate(rows):
        index, responses = row.get("index"), row.get("responses")
        where = f"--predictions {path}: row {number} of task {task.name}"
        if type(index) is not int or not 0 <= index < problems:
            raise InputError(
                f"{where}: 'index' is {index!r}; the data file has rows 0 to {problems - 1}"
            )
        if index in seen:
            raise InputError(
                f"{where}: index {index} for the second time; put all responses into one row"
            )
        if not _is_texts(responses):
            raise InputError(f"{where}: 'responses' must be a list of texts with at least one")
        endings = row.get("finish_reason")
        if endings is not None and not (_is_texts(endings) and len(endings) == len(responses)):
            raise InputError(f"{where}: 'finish_reason' must hold one text a response; correct it")
        seen.add(index)
    return rows


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def check_scorer(task: Task, rows: list[Row]) -> None:
    """RunError when this machine lacks what the task is graded with; the message installs it."""
    lacks = task.missing(rows)
    if lacks:
        raise RunError(f"task {task.name}: {lacks}")


class Verdicts:
    """The grades of a scoring under way, by problem. OUT gets ``settings.json`` and a line in
    ``graded.partial.jsonl`` for each graded problem; both make way for the results. Nothing is
    there before the first verdicts.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """InputError: --out holds anything else than a scoring of these settings."""
        finished_rows(out, settings)  # one killed while it published is published again
        self._out, self._settings = out, settings
        self._grades: dict[int, list[Grade]] = {}
        self.seconds = 0.0  # of grading, over all attempts
        for row in whole_lines(out / PARTIAL, _is_verdict, _NO_VERDICT):
            self._grades[row["index"]] = [Grade(**grade) for grade in row["grades"]]
            self.seconds = row["seconds"]

    def __contains__(self, index: int) -> bool:
        return index in self._grades

    def __getitem__(self, index: int) -> list[Grade]:
        return self._grades[index]

    def add(self, grades: dict[int, list[Grade]], seconds: float) -> None:
        """More problems are graded, which took this long. They are on disk afterwards."""
        self._out.mkdir(parents=True, exist_ok=True)
        if not (self._out / SETTINGS).is_file():
            write_json(self._out / SETTINGS, self._settings)
        self.seconds += seconds
        self._grades |= grades
        rows = [
            {"index": i, "grades": [asdict(grade) for grade in own], "seconds": self.seconds}
            for i, own in grades.items()
        ]
        append_jsonl(self._out / PARTIAL, rows)

    def publish(self, graded: list[dict[str, Any]], summary: SummaryRow) -> None:
        """All are graded: ``summary.json`` comes last and says that the rest is there."""
        write_jsonl(self._out / GRADED, graded)
        write_json(self._out / SUMMARY, [summary.as_dict()])
        (self._out / SETTINGS).unlink()  # first: what is left by a kill here is never gone on with
        (self._out / PARTIAL).unlink()


_NO_VERDICT = "not a verdict of evaluation.score; remove the line, and its problem is graded again"


def _is_verdict(row: object) -> bool:
    return isinstance(row, dict) and {"index", "grades", "seconds"} <= row.keys()


def grade_in_parts(
    task: Task, rows: list[Row], predictions: list[Row], verdicts: Verdicts, *, show: bool
) -> None:
    """Grade what has no verdict yet, as ``grade_predictions`` does, and keep it part by part: a
    part takes about as long as a user would like to lose, and is large enough to fill the cores.
    """
    pairs = list(zip(rows, predictions, strict=True))
    left = [pair for pair in pairs if pair[1]["index"] not in verdicts]
    total, missing = (sum(len(given["responses"]) for _, given in some) for some in (pairs, left))
    size = FIRST_PART
    with Progress(f"{task.name}, graded", total, total - missing, show=show) as progress:
        while left:
            part, left = left[:size], left[size:]
            start = time.monotonic()
            given = [prediction for _, prediction in part]
            grades = grade_predictions(task, [row for row, _ in part], given)
            seconds = time.monotonic() - start
            indices = (prediction["index"] for prediction in given)
            verdicts.add(dict(zip(indices, grades, strict=True)), seconds)
            progress.advance(count=sum(map(len, grades)))
            wanted = int(size * PART_SECONDS / max(seconds, 1e-6))
            size = min(max(wanted, FIRST_PART), 4 * size)


def score(
    task: Task, data: Path, predictions: Path, out: Path, *, show: bool = False
) -> SummaryRow:
    """Grade one predictions file and write the results; goes on with what is in ``out`` of the same
    scoring. ``show``: how far it is. InputError: ``out`` holds anything else.
    """
    problems = task.load(data)
    given = read_predictions(predictions, task, len(problems))
    rows = [problems[row["index"]] for row in given]
    check_scorer(task, rows)
    settings = task.settings()
    asked = {
        "task": task.name,
        "data": hash_rows(problems),
        "predictions": hash_rows(given),
        "sandbox": settings.get("sandbox", {}).get("layers"),
    }
    verdicts = Verdicts(out, asked)
    grade_in_parts(task, rows, given, verdicts, show=show)
    grades = [verdicts[row["index"]] for row in given]
    summary = summary_of(task, rows, given, grades, seconds=verdicts.seconds, settings=settings)
    graded = [
        graded_row(row["index"], row_grades) for row, row_grades in zip(given, grades, strict=True)
    ]
    verdicts.publish(graded, summary)
    return summary


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--task", required=True, metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_sandbox_flag(parser)
    args = parser.parse_args()
    use_sandbox(args.sandbox)
    summary = score(get_task(args.task), args.data, args.predictions, args.out, show=True)
    tell_scorer_errors(summary.as_dict())
    print(table([summary.as_dict()]))


if __name__ == "__main__":
    command(main)
