"""Exact match on the user's own JSONL file.

A row asks by ``question`` (one user turn), ``messages``, ``prompt`` (raw text, no chat template) or
``prompt_ids``, and holds ``answer``: a string or a list of accepted strings. With ``marker`` the
text after its last occurrence is compared (to the end of that line), without it the whole response;
outer white space never counts.

The task ``exact_match`` reads DIR/exact_match.jsonl, ``exact_match:NAME`` reads DIR/NAME.jsonl.
"""

from typing import ClassVar

from evaluation.grading.text import after_last, is_one_of
from evaluation.tasks.task import Grade, Row, Task

_ASKS_BY: dict[str, type] = {"question": str, "messages": list, "prompt": str, "prompt_ids": list}


class ExactMatch(Task):
    how_to_get: ClassVar[str] = (
        'write one object a line, e.g. {"question": "2+2=", "answer": ["4", "four"]}'
    )

    def __init__(self, dataset: str | None = None) -> None:
        self.name = f"exact_match:{dataset}" if dataset else "exact_match"
        self.file = f"{dataset or 'exact_match'}.jsonl"

    def problem_of(self, row: Row) -> str | None:
        given = [key for key in _ASKS_BY if key in row]
        if len(given) != 1:
            return (
                f"needs exactly one of {', '.join(_ASKS_BY)}, has {' and '.join(given) or 'none'}; "
                f"{self.how_to_get}"
            )
        if not isinstance(row[given[0]], _ASKS_BY[given[0]]) or not row[given[0]]:
            kind = _ASKS_BY[given[0]].__name__
            return f"{given[0]!r} must be a {kind} that is not empty; {self.how_to_get}"
        if not _is_answer(row.get("answer")):
            return f"'answer' must be a string or a list of strings; {self.how_to_get}"
        if "marker" in row and not (isinstance(row["marker"], str) and row["marker"]):
            return "'marker' must be a string that is not empty; leave it out to compare everything"
        return None

    def prompt(self, row: Row) -> Row:
        if "question" in row:
            return {"messages": [{"role": "user", "content": row["question"]}]}
        return {key: row[key] for key in ("messages", "prompt", "prompt_ids") if key in row}

    def grade(self, row: Row, response: str) -> Grade:
        accepted = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        extracted = after_last(response, row["marker"]) if "marker" in row else response.strip()
        flags = [] if extracted else ["no_answer"]
        return Grade(
            correct=is_one_of(extracted, accepted), extracted=extracted or None, flags=flags
        )


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
