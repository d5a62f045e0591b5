"""Questions with lettered options; the response chooses one."""

import re
from typing import ClassVar

from evaluation.grading.multiple_choice import (
    extract_letter,
    extract_letter_strictly,
    options_of,
    reference_letter,
)
from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import Grade, Row

PROMPT = (
    "{question}\nPlease show your choice in the answer field with only the choice letter, e.g., "
    '"answer": "C".'
)
_OPTION = re.compile(r"\(([A-J])\)\s*")


class MultipleChoice(PublishedTask):
    """Rows ``{"question" with its options, "ground_truth_answer": a letter}``.

    The paper's verdict takes the first letter of whatever follows "answer:"; the strict one asks
    for a letter that stands alone and is one of the row's options.
    """

    letters: ClassVar[str] = "ABCDEFGHIJ"  # that the paper's rule allows
    reformats_options: ClassVar[bool] = False  # "(A) text" -> "A. text", anywhere in the question

    def problem_of_reference(self, row: Row) -> str | None:
        answer = row.get("ground_truth_answer")
        if not isinstance(answer, str) or not re.fullmatch("[A-Z]", reference_letter(answer)):
            return "needs 'ground_truth_answer', one letter; use the published file"
        return None

    def question(self, row: Row) -> str:
        text = row["question"]
        if self.reformats_options:
            text = _OPTION.sub(r"\1. ", text)
        return PROMPT.format(question=text)

    def grade(self, row: Row, response: str) -> Grade:
        reference = reference_letter(row["ground_truth_answer"])
        letter = extract_letter(response, self.letters)
        offered = options_of(row["question"], self.letters)
        return Grade(
            correct=letter == reference,
            extracted=letter,
            flags=[] if letter else ["no_answer"],
            strict=extract_letter_strictly(response, offered) == reference,
        )
