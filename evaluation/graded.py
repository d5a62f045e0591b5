"""Predictions as verdicts, rows of graded files and a summary row: what ``evaluation.run`` and
``evaluation.score`` share.
"""

from dataclasses import replace
from typing import Any

from evaluation.grading.response import without_control_tokens, without_thinking
from evaluation.reporting.summary import NOTHING_TO_VERIFY, Counts, SummaryRow, skipped, summarize
from evaluation.tasks import NOT_SCORED, Grade, Row, Task
from evaluation.tasks.guarded import grade_guarded

PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason where there was no room for a response


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
