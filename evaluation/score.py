"""Grade responses that were generated anywhere.

Predictions: one object a line, ``{"index": row in the task's data file from 0, "responses": ["...",
...]}``. Rows may be missing; the score is over those given. Rows with a ``task`` key of another
task are passed over, so that the predictions.jsonl of ``evaluation.run`` can be graded again.
A row may hold ``finish_reason``, a list with "stop" or "length" (ran into the limit) for each
response. Writes ``summary.json`` and ``graded.jsonl`` into --out.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from evaluation.grading.response import without_control_tokens, without_thinking
from evaluation.jail.sandbox import use_sandbox
from evaluation.jsonl import read_jsonl
from evaluation.report import table
from evaluation.reporting.summary import NOTHING_TO_VERIFY, Counts, SummaryRow, skipped, summarize
from evaluation.sandbox_flag import add_sandbox_flag
from evaluation.tasks import NOT_SCORED, Grade, Row, Task, get_task
from evaluation.tasks.guarded import grade_guarded
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import check_new_directory, write_json, write_jsonl

PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason where there was no room for a response


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


def grade_predictions(task: Task, rows: list[Row], predictions: list[Row]) -> list[list[Grade]]:
    """Grade ``predictions[i]["responses"]`` to ``rows[i]``, the whole task at once.

    Control tokens and thinking never reach the task's grader. A thinking block that never ends
    leaves no answer. ``finish_reason``, where given, flags the responses that ran into the limit,
    and those that were never made because the prompt was too long.
    """
    read = [
        [without_thinking(without_control_tokens(text)) for text in prediction["responses"]]
        if PROMPT_TOO_LONG not in (prediction.get("finish_reason") or ())
        else [None] * len(prediction["responses"])
        for prediction in predictions
    ]
    answers = [[text for text in texts if text is not None] for texts in read]
    grades = []
    for prediction, texts, graded in zip(
        predictions, read, grade_guarded(task, rows, answers), strict=True
    ):
        endings = prediction.get("finish_reason") or [None] * len(texts)
        left = iter(graded)
        grades.append(
            [
                _with_ending(_UNFINISHED_THINKING if text is None else next(left), ending)
                for text, ending in zip(texts, endings, strict=True)
            ]
        )
    return grades


_UNFINISHED_THINKING = Grade(
    correct=False, extracted=None, flags=["no_answer", "unfinished_thinking"]
)


def _with_ending(grade: Grade, ending: str | None) -> Grade:
    if ending == PROMPT_TOO_LONG:
        return replace(grade, flags=["no_answer", PROMPT_TOO_LONG])
    return replace(grade, flags=[*grade.flags, "truncated"]) if ending == "length" else grade


def truncation_rate(predictions: list[Row]) -> float | None:
    """Share of the responses that ran into the limit; None when that was not recorded."""
    endings = [row.get("finish_reason") for row in predictions]
    if not all(endings):
        return None
    flat = [ending == "length" for row in endings for ending in row or []]
    return sum(flat) / len(flat)


def counts_of(predictions: list[Row]) -> Counts | None:
    """What ``evaluation.run`` counted, from its predictions; None when it is not all there."""
    kinds = {"response_ids": list, "passes": int, "forwards": int}
    for row in predictions:
        for key, kind in kinds.items():
            values = row.get(key)
            if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
                return None
    return Counts(
        responses=sum(len(row["responses"]) for row in predictions),
        response_tokens=sum(len(ids) for row in predictions for ids in row["response_ids"]),
        passes=sum(sum(row["passes"]) for row in predictions),
        forwards=sum(sum(row["forwards"]) for row in predictions),
    )


def graded_row(index: int, grades: list[Grade]) -> dict[str, Any]:
    """The verdicts on one problem; ``strict`` and ``scores`` only where the task has them."""
    row = {
        "index": index,
        "correct": [grade.correct for grade in grades],
        "extracted": [grade.extracted for grade in grades],
        "flags": [grade.flags for grade in grades],
    }
    if any(grade.strict is not None for grade in grades):
        row["strict"] = [grade.strict for grade in grades]
    if any(grade.scores for grade in grades):
        row["scores"] = [grade.scores for grade in grades]
    return row


def summary_of(
    task: Task,
    rows: list[Row],
    predictions: list[Row],
    grades: list[list[Grade]],
    *,
    seconds: float,
    settings: dict[str, Any],
) -> SummaryRow:
    """The summary row of graded predictions, with everything that they allow to be counted. Rows
    without a verifiable answer are left out.
    """
    scored = [i for i, row in enumerate(grades) if not any(NOT_SCORED in g.flags for g in row)]
    if not scored:
        return skipped(task.name, NOTHING_TO_VERIFY, settings)
    return summarize(
        task.name,
        [grades[i] for i in scored],
        counts_of(predictions),
        seconds=seconds,
        settings=settings,
        truncation_rate=truncation_rate(predictions),
        divisions=[task.division(rows[i]) for i in scored],
        pass_at_k=task.samples_pass_at_k,
    )


def tell_scorer_errors(summary: dict[str, Any]) -> None:
    """Say on the terminal that a scorer failed on some responses."""
    failed = summary.get("scorer_errors")
    if failed:
        print(
            f"evaluation: {summary['task']}: the scorer failed on {failed} responses, which count "
            "as wrong; their flags say scorer_error",
            flush=True,
        )


def check_scorer(task: Task, rows: list[Row]) -> None:
    """RunError when this machine lacks what the task is graded with; the message installs it."""
    lacks = task.missing(rows)
    if lacks:
        raise RunError(f"task {task.name}: {lacks}")


def score(task: Task, data: Path, predictions: Path, out: Path) -> SummaryRow:
    """Grade one predictions file and write the results."""
    check_new_directory(out, "--out")
    problems = task.load(data)
    given = read_predictions(predictions, task, len(problems))
    rows = [problems[row["index"]] for row in given]
    check_scorer(task, rows)
    start = time.monotonic()
    grades = grade_predictions(task, rows, given)
    summary = summary_of(
        task, rows, given, grades, seconds=time.monotonic() - start, settings=task.settings()
    )
    out.mkdir(parents=True, exist_ok=True)
    graded = [
        graded_row(row["index"], row_grades) for row, row_grades in zip(given, grades, strict=True)
    ]
    write_jsonl(out / "graded.jsonl", graded)
    write_json(out / "summary.json", [summary.as_dict()])
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
    summary = score(get_task(args.task), args.data, args.predictions, args.out)
    tell_scorer_errors(summary.as_dict())
    print(table([summary.as_dict()]))


if __name__ == "__main__":
    command(main)
