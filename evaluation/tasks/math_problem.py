"""Mathematical problems with one reference answer, compared by math-verify."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import SCORER_ERROR, Grade, Row

if TYPE_CHECKING:
    from evaluation.grading.mathematics import MathVerdict

PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


class MathProblem(PublishedTask):
    """Rows ``{"question", "ground_truth_answer"}``; the answer is LaTeX text or a number.

    The paper's verdict takes any number of the response when nothing is boxed or announced as the
    answer, and boxes that stand near each other as one answer; the strict one asks for the box or
    the announcement, and takes the last box.
    """

    def problem_of_reference(self, row: Row) -> str | None:
        answer = row.get("ground_truth_answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            return "needs 'ground_truth_answer', a text or a number; use the published file"
        return None if str(answer).strip() else "'ground_truth_answer' is empty; give the answer"

    def missing(self, rows: list[Row]) -> str | None:
        if find_spec("math_verify") is None:
            return "its scorer is the package math-verify, not installed; run launch/setup.sh"
        return None

    def question(self, row: Row) -> str:
        return PROMPT.format(question=row["question"])

    def grade(self, row: Row, response: str) -> Grade:
        return self.grade_all([row], [[response]])[0][0]

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        from evaluation.grading.mathematics import grade_all_math  # sympy takes seconds to import

        references = [
            str(row["ground_truth_answer"])
            for row, texts in zip(rows, responses, strict=True)
            for _ in texts
        ]
        verdicts = iter(grade_all_math([text for texts in responses for text in texts], references))
        return [[_grade(next(verdicts)) for _ in texts] for texts in responses]


def _grade(verdict: "MathVerdict") -> Grade:
    flags = ["scorer_timeout"] if verdict.timed_out else []
    if verdict.error is not None:
        flags.append(f"{SCORER_ERROR}: {verdict.error}")
    elif verdict.extracted is None:
        flags.append("no_answer")
    return Grade(
        correct=verdict.correct, extracted=verdict.extracted, flags=flags, strict=verdict.strict
    )
