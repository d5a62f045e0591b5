"""The training sets as tasks: how much of what a run saw, or should transfer, it can answer."""

from typing import Any

from evaluation.grading.code_probe import check, program_of, read_tests
from evaluation.jail.sandbox import default_sandbox, sandbox_problem
from evaluation.tasks.math_problem import MathProblem
from evaluation.tasks.multiple_choice import MultipleChoice
from evaluation.tasks.programs import grade_programs
from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import NOT_SCORED, Grade, Row

_OWN_FILE = (
    "it is not published in this form; write a JSON list of objects with 'question' and "
    "'ground_truth_answer'"
)
_NOT_SCORED = Grade(correct=False, extracted=None, flags=[NOT_SCORED])


class OPDLMTrain(PublishedTask):
    """The general training mixture. A row's ``domain`` says how it is asked and graded.

    math: as a mathematical problem; science: as multiple choice; code: the question as it is, run
    against ``tests_json`` in the sandbox. Chat, other domains, tests that cannot be read and
    answers that their domain cannot compare (a science row's that is no letter) are not verifiable:
    such a row is flagged and left out of the accuracy.
    """

    name = "opdlm_train"
    file = "opdlm_train.json"
    _ran_programs = False

    def __init__(self) -> None:
        self._by_domain: dict[str, PublishedTask] = {
            "math": MathProblem(),
            "science": MultipleChoice(),
            "mc": MultipleChoice(),
        }

    def problem_of_reference(self, row: Row) -> str | None:
        task = self._by_domain.get(_domain(row))
        if task is None or "ground_truth_answer" in row:
            return None
        return task.problem_of_reference(row)

    def missing(self, rows: list[Row]) -> str | None:
        runs_programs = any(_is_scorable_code(row) for row in rows)
        return self._by_domain["math"].missing(rows) or (
            sandbox_problem() if runs_programs else None
        )

    def settings(self) -> dict[str, Any]:
        return {"sandbox": default_sandbox().describe()} if self._ran_programs else {}

    def division(self, row: Row) -> str | None:
        return _domain(row)

    def question(self, row: Row) -> str:
        task = self._by_domain.get(_domain(row))
        return task.question(row) if task else row["question"]

    def grade(self, row: Row, response: str) -> Grade:
        return self.grade_all([row], [[response]])[0][0]

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        grades = [[_NOT_SCORED] * len(texts) for texts in responses]
        for domain, task in self._by_domain.items():
            own = [
                i for i, row in enumerate(rows) if _domain(row) == domain and _has_answer(task, row)
            ]
            graded = task.grade_all([rows[i] for i in own], [responses[i] for i in own])
            for i, row_grades in zip(own, graded, strict=True):
                grades[i] = row_grades
        code = [i for i, row in enumerate(rows) if _is_scorable_code(row)]
        if code:
            self._ran_programs = True
            programs = [[program_of(rows[i], text) for text in responses[i]] for i in code]
            graded = grade_programs(default_sandbox(), [rows[i] for i in code], programs, check)
            for i, row_grades in zip(code, graded, strict=True):
                grades[i] = row_grades
        return grades


def _domain(row: Row) -> str:
    """The row's domain; math where it names none, as in the reference."""
    return row.get("domain") or "math"


def _has_answer(task: PublishedTask, row: Row) -> bool:
    return task.problem_of_reference(row) is None


def _is_scorable_code(row: Row) -> bool:
    return _domain(row) == "code" and read_tests(row.get("tests_json")) is not None


class MATHTrain(MathProblem):
    """Hendrycks MATH, levels 3 to 5: the training set of the mathematical models."""

    name = "MATH_train_traceRL"
    file = "MATH_train_traceRL.json"


class DAPOMath(MathProblem):
    """DAPO's 17,000 problems."""

    name = "DAPO_Math_17k"
    file = "DAPO_Math_17k.json"


class GSM8KTrain(MathProblem):
    """The training split of GSM8K."""

    name = "GSM8K_train"
    file = "GSM8K_train.json"
    how_to_get = _OWN_FILE
