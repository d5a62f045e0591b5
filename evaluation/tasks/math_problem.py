"""Mathematical problems with one reference answer, compared by math-verify."""

from importlib.util import find_spec

from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import Grade, Row

PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


class MathProblem(PublishedTask):
    """Rows ``{"question", "ground_truth_answer"}``; the answer is LaTeX text or a number.

    The paper's verdict takes any number of the response when nothing is boxed or announced as the
    answer; the strict one asks for the box or the announcement.
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
        from evaluation.grading.mathematics import grade_math  # sympy takes seconds to import

        verdict = grade_math(response, str(row["ground_truth_answer"]))
        flags = ["scorer_timeout"] if verdict.timed_out else []
        if verdict.extracted is None:
            flags.append("no_answer")
        return Grade(
            correct=verdict.correct,
            extracted=verdict.extracted,
            flags=flags,
            strict=verdict.correct and verdict.anchored,
        )
