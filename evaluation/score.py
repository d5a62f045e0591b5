"""Grade responses that were generated anywhere.

Predictions: one object a line, ``{"index": row in the task's data file from 0, "responses": ["...",
...]}``. Rows may be missing; the score is over those given. Rows with a ``task`` key of another
task are passed over, so that the predictions.jsonl of ``evaluation.run`` can be graded again.
A row may hold ``finish_reason``, a list with "stop" or "length" (ran into the limit) for each
response. Writes ``summary.json`` and ``graded.jsonl`` into --out, whole, at the end; the same
command goes on where it was killed. An --out with other predictions, other data or another sandbox
is refused.
"""

from pathlib import Path
from typing import TypeGuard

from evaluation.generation.identity import hash_rows
from evaluation.generation.predictions import SETTINGS, finished_rows
from evaluation.generation.verdicts import Verdicts, grade_in_parts, sandbox_layers
from evaluation.graded import graded_row, summary_of, tell_scorer_errors
from evaluation.jail.sandbox import use_sandbox
from evaluation.jsonl import read_jsonl
from evaluation.report import table
from evaluation.reporting.results import SUMMARY
from evaluation.reporting.summary import SummaryRow
from evaluation.sandbox_flag import add_sandbox_flag
from evaluation.tasks import Row, Task, get_task
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import write_json, write_jsonl

GRADED = "graded.jsonl"


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
        "sandbox": sandbox_layers(task),
    }
    finished_rows(out, asked)  # one killed while it published is published again
    verdicts = Verdicts(task, out, asked)
    grades = grade_in_parts(task, rows, given, verdicts, show=show)
    summary = summary_of(task, rows, given, grades, seconds=verdicts.seconds, settings=settings)
    graded = [
        graded_row(row["index"], row_grades) for row, row_grades in zip(given, grades, strict=True)
    ]
    write_jsonl(out / GRADED, graded)
    write_json(out / SUMMARY, [summary.as_dict()])  # last: it says that the rest is there
    (out / SETTINGS).unlink()  # first: what is left by a kill here is never gone on with
    verdicts.discard()
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
