"""LiveBench of 2024-11-25: 1,436 questions in six categories, graded by its own package."""

import os
from dataclasses import replace
from typing import Any

from evaluation.grading import code_lcb as lcb
from evaluation.grading.livebench import (
    THRESHOLD,
    missing_for,
    program_of,
    scorer_of,
    tests_of,
)
from evaluation.grading.scorer_process import Job, Outcome, score_all
from evaluation.jail.sandbox import default_sandbox, sandbox_problem
from evaluation.tasks.programs import grade_programs
from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import Grade, Row

_SCORER = "evaluation.grading.livebench:score_response"


class LiveBench(PublishedTask):
    """Rows with ``livebench_category``, ``livebench_task`` and what the official scorer reads.

    A response is correct when its score is above 0.5, as the paper counts. LiveBench itself
    averages the scores of each category, then the categories: ``accuracy_score`` of each division.
    """

    name = "LiveBench"
    file = "LiveBench.json"
    _ran_programs = False

    def problem_of_reference(self, row: Row) -> str | None:
        for key in ("livebench_category", "livebench_task"):
            if not isinstance(row.get(key), str):
                return f"needs the text {key!r}; use the published file"
        if row["livebench_category"] == "instruction_following":
            if not row.get("instruction_id_list") or not isinstance(row.get("kwargs"), list):
                return "needs 'instruction_id_list' and 'kwargs'; use the published file"
        elif row["livebench_category"] != "coding" and "ground_truth_answer" not in row:
            return "needs 'ground_truth_answer'; use the published file"
        if row["livebench_category"] == "coding":
            return _problem_of_tests(row)
        if scorer_of(row) is None:
            kind = f"{row['livebench_category']}/{row['livebench_task']}"
            return f"LiveBench of 2024-11-25 has no {kind}; use the published file"
        return None

    def missing(self, rows: list[Row]) -> str | None:
        runs_programs = any(row["livebench_category"] == "coding" for row in rows)
        return missing_for({scorer for row in rows if (scorer := scorer_of(row))}) or (
            sandbox_problem() if runs_programs else None
        )

    def settings(self) -> dict[str, Any]:
        return {"sandbox": default_sandbox().describe()} if self._ran_programs else {}

    def division(self, row: Row) -> str | None:
        return row["livebench_category"]

    def grade(self, row: Row, response: str) -> Grade:
        return self.grade_all([row], [[response]])[0][0]

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        coding = [i for i, row in enumerate(rows) if row["livebench_category"] == "coding"]
        others = sorted(set(range(len(rows))) - set(coding))
        self._ran_programs = self._ran_programs or bool(coding)
        graded = _by_package(others, rows, responses) | _in_sandbox(coding, rows, responses)
        return [graded[i] for i in range(len(rows))]


def _problem_of_tests(row: Row) -> str | None:
    try:
        tests_of(row)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # of any other shape
        return f"its tests cannot be read ({error}); use the published file"
    return None


def _by_package(
    places: list[int], rows: list[Row], responses: list[list[str]]
) -> dict[int, list[Grade]]:
    """Grades of the rows at these places, by the package's scorers in child processes."""
    jobs = [
        Job(row=rows[i], response=text.rstrip(), seconds=scorer.seconds, scorer=_SCORER)
        for i in places
        for text in responses[i]
        if (scorer := scorer_of(rows[i]))
    ]
    outcomes = iter(score_all(jobs, os.cpu_count() or 1))
    return {i: [_grade(text, next(outcomes)) for text in responses[i]] for i in places}


def _in_sandbox(
    places: list[int], rows: list[Row], responses: list[list[str]]
) -> dict[int, list[Grade]]:
    """Grades of the programming rows at these places."""
    if not places:
        return {}
    asked = [rows[i] for i in places]
    programs = [[program_of(rows[i], text) for text in responses[i]] for i in places]
    grades = grade_programs(
        default_sandbox(),
        asked,
        programs,
        lambda jail, row, program: lcb.check(jail, tests_of(row), program),
    )
    return {
        i: [replace(grade, scores={"score": float(grade.correct)}) for grade in row]
        for i, row in zip(places, grades, strict=True)
    }


def _grade(response: str, outcome: Outcome) -> Grade:
    flags = [] if outcome.error is None else [f"scorer_error: {outcome.error}"]
    if not response.strip():
        flags.append("no_answer")
    return Grade(
        correct=outcome.score > THRESHOLD,
        extracted=response.rstrip() or None,
        flags=flags,
        scores={"score": outcome.score},
    )
