"""Codeforces: stdin/stdout problems of open-r1/codeforces' test split."""

from typing import Any, ClassVar

from evaluation.grading.code_outputs import same_words
from evaluation.grading.code_run import InputOutput, Verdict, run_stdio
from evaluation.grading.code_text import fenced_python
from evaluation.jail.sandbox import Jail, default_sandbox, sandbox_problem
from evaluation.tasks.programs import grade_programs
from evaluation.tasks.task import Grade, Row, Task

_TEMPLATE = (
    "This is the problem:\n{question}\nYou should put your code in ```python ```. Use input() to "
    "read input and print() to produce output in your script. "
)


class Codeforces(Task):
    """Rows ``{"task_id", "question", "test_input", "test_output", "test_time_limit" (seconds)}``.

    A response is right if its program prints the expected words for every input. As in the
    reference, which gives programs an ``input`` of its own, prompts are no output.
    """

    name = "Codeforces"
    file = "Codeforces.json"
    how_to_get: ClassVar[str] = (
        "fetch it: python -m evaluation.download --data DIR --tasks Codeforces"
    )
    samples_pass_at_k: ClassVar[bool] = True

    def problem_of(self, row: Row) -> str | None:
        if not isinstance(row.get("question"), str):
            return f"needs the text 'question'; {self.how_to_get}"
        if row.get("test_method", "stdio") != "stdio":
            return f"'test_method' is {row['test_method']!r}; only stdio is known here"
        given, expected = row.get("test_input"), row.get("test_output")
        if not _texts(given) or not _texts(expected) or len(given or []) != len(expected or []):
            return f"'test_input' and 'test_output' must list as many texts; {self.how_to_get}"
        limit = row.get("test_time_limit", 1)
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0:
            return f"'test_time_limit' is {limit!r}; give seconds above 0"
        return None

    def missing(self, rows: list[Row]) -> str | None:
        return sandbox_problem()

    def settings(self) -> dict[str, Any]:
        return {"sandbox": default_sandbox().describe()}

    def prompt(self, row: Row) -> Row:
        content = _TEMPLATE.replace("{question}", row["question"])
        return {"messages": [{"role": "user", "content": content}]}

    def grade(self, row: Row, response: str) -> Grade:
        return self.grade_all([row], [[response]])[0][0]

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        programs = [[fenced_python(text).strip() for text in texts] for texts in responses]
        return grade_programs(default_sandbox(), rows, programs, _check)


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _check(jail: Jail, row: Row, program: str) -> Verdict:
    pairs = zip(row["test_input"], row["test_output"], strict=True)
    tests = [InputOutput(given=given, expected=expected) for given, expected in pairs]
    limit = float(row.get("test_time_limit", 1))
    return run_stdio(jail, program, tests, cpu=limit, same=same_words, prompts=False)
