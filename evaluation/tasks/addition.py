"""The quickstart's toy task: written-out addition; the answer follows the last ``#``."""

from typing import ClassVar

from evaluation.grading.text import after_last, is_one_of
from evaluation.tasks.task import Grade, Row, Task

ANSWER_MARKER = "#"


class Addition(Task):
    """Rows ``{"question": "57+68=", "answer": "125"}``; other keys are ignored."""

    name = "addition"
    file = "addition.jsonl"
    how_to_get: ClassVar[str] = "write it with: python -m launch.quickstart.task --out DIR"

    def problem_of(self, row: Row) -> str | None:
        for key in ("question", "answer"):
            if not isinstance(row.get(key), str):
                return f"needs the text {key!r}; {self.how_to_get}"
        return None

    def prompt(self, row: Row) -> Row:
        return {"messages": [{"role": "user", "content": row["question"]}]}

    def grade(self, row: Row, response: str) -> Grade:
        extracted = after_last(response, ANSWER_MARKER)
        flags = [] if extracted is not None else ["no_answer"]
        return Grade(
            correct=is_one_of(extracted, [row["answer"]]), extracted=extracted, flags=flags
        )
