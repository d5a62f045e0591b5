"""LiveCodeBench v6 (Jain et al., arXiv 2403.07974), contests 2024-08 to 2025-05."""

from typing import Any, ClassVar

from evaluation.grading import code_lcb as lcb
from evaluation.grading.code_run import Verdict
from evaluation.grading.code_text import last_fence
from evaluation.jail.sandbox import Jail, default_sandbox, sandbox_problem
from evaluation.tasks.programs import grade_programs
from evaluation.tasks.task import Grade, Row, Task

_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program."
)


class LiveCodeBench(Task):
    """Rows ``{"task_id", "question" (rendered), "input_output" (JSON text), ...}``.

    A response is right if its program passes every test, public and private.
    """

    name = "LCB-v6"
    file = "LCB_v6.json"
    how_to_get: ClassVar[str] = "fetch it: python -m evaluation.download --data DIR --tasks LCB-v6"
    samples_pass_at_k: ClassVar[bool] = True
    may_think: ClassVar[bool] = False  # as the paper's code asks

    def problem_of(self, row: Row) -> str | None:
        if not isinstance(row.get("question"), str):
            return f"needs the text 'question'; {self.how_to_get}"
        try:
            lcb.tests_of(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"its tests cannot be read ({error}); {self.how_to_get}"
        return None

    def missing(self, rows: list[Row]) -> str | None:
        return sandbox_problem()

    def settings(self) -> dict[str, Any]:
        return {"sandbox": default_sandbox().describe()}

    def division(self, row: Row) -> str | None:
        platform = row.get("platform")
        return platform if isinstance(platform, str) else None

    def prompt(self, row: Row) -> Row:
        return {
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": row["question"]},
            ]
        }

    def grade(self, row: Row, response: str) -> Grade:
        return self.grade_all([row], [[response]])[0][0]

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        programs = [[last_fence(text).rstrip() for text in texts] for texts in responses]
        return grade_programs(default_sandbox(), rows, programs, _check)


def _check(jail: Jail, row: Row, program: str) -> Verdict:
    return lcb.check(jail, lcb.tests_of(row), program)
