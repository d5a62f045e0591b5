"""Grade responses that were generated anywhere.

Predictions: one object a line, ``{"index": row in the task's data file from 0, "responses": ["...",
...]}``. Rows may be missing; the score is over those given. Rows with a ``task`` key of another
task are passed over, so that the predictions.jsonl of ``evaluation.run`` can be graded again.
Writes ``summary.json`` and ``graded.jsonl`` into --out.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from evaluation.grading.text import without_control_tokens
from evaluation.jsonl import check_new_directory, read_jsonl, write_json, write_jsonl
from evaluation.report import table
from evaluation.summary import Counts, SummaryRow, summarize
from evaluation.tasks import Grade, Row, Task, get_task
from megatron_opdlm.errors import Arguments, InputError, command


def read_predictions(path: Path, task: Task, problems: int) -> list[Row]:
    """The predictions of one task, checked against its number of problems.

    InputError: file, index, rule, remedy.
    """
    rows = [
        row for row in read_jsonl(path, "--predictions") if row.get("task", task.name) == task.name
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
        seen.add(index)
    return rows


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def grade_responses(task: Task, row: Row, responses: list[str]) -> list[Grade]:
    """Grade the responses to one data row; control tokens never reach the task's grader."""
    return [task.grade(row, without_control_tokens(text)) for text in responses]


def counts_of(predictions: list[Row]) -> Counts | None:
    """What ``evaluation.run`` counted, from its predictions; None when it is not all there."""
    wanted = ("response_ids", "passes", "forwards")
    if not all(isinstance(row.get(key), list) for row in predictions for key in wanted):
        return None
    return Counts(
        responses=sum(len(row["responses"]) for row in predictions),
        response_tokens=sum(len(ids) for row in predictions for ids in row["response_ids"]),
        passes=sum(sum(row["passes"]) for row in predictions),
        forwards=sum(sum(row["forwards"]) for row in predictions),
    )


def graded_row(index: int, grades: list[Grade]) -> dict[str, Any]:
    return {
        "index": index,
        "correct": [grade.correct for grade in grades],
        "extracted": [grade.extracted for grade in grades],
        "flags": [grade.flags for grade in grades],
    }


def score(task: Task, data: Path, predictions: Path, out: Path) -> SummaryRow:
    """Grade one predictions file and write the results."""
    check_new_directory(out, "--out")
    problems = task.load(data)
    rows = read_predictions(predictions, task, len(problems))
    start = time.monotonic()
    grades = [grade_responses(task, problems[row["index"]], row["responses"]) for row in rows]
    summary = summarize(
        task.name, grades, counts_of(rows), seconds=time.monotonic() - start, settings={}
    )
    out.mkdir(parents=True, exist_ok=True)
    graded = [
        graded_row(row["index"], row_grades) for row, row_grades in zip(rows, grades, strict=True)
    ]
    write_jsonl(out / "graded.jsonl", graded)
    write_json(out / "summary.json", [summary.as_dict()])
    return summary


def main() -> None:
    parser = Arguments(
        prog="python -m evaluation.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    summary = score(get_task(args.task), args.data, args.predictions, args.out)
    print(table([summary.as_dict()]))


if __name__ == "__main__":
    command(main)
