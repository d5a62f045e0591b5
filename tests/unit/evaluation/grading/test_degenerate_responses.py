"""What a collapsed model writes: one thing, thousands of times. No grader may hang on it.

Costs are in processor time of this process, with room for a slow machine: what these tests are to
find grows with the square or the cube of the length, and takes minutes.
"""

import time

import pytest

from evaluation.grading import instructions
from evaluation.grading.house_grid import first_object, last_grid
from evaluation.grading.multiple_choice import extract_letter, extract_letter_strictly, options_of
from evaluation.grading.response import without_control_tokens, without_thinking
from evaluation.tasks import get_task

LENGTH = 20_000
KINDS = {
    "newlines": "\n",
    "dots": ".",
    "blanks": " ",
    "brackets": "(",
    "braces": "{",
    "stars": "*",
    "quotes": '"',
    "letters": "A ",
    "answers": "answer ",
    "statements": "The answer is ",
    "boxes": "\\boxed{",
    "objects": '{"a":',
    "lists": '{"a":[',
    "fences": "```json\n",
    "backslashes": "\\",
    "thoughts": "<think>",
}
OPENINGS = ("The answer is", "Answer:", "answer", "\\boxed{", "the answer is option")
# A quiet core takes less than one. Nested JSON makes the collector walk over everything that other
# tests of the process have left, ten seconds of it at times; without the bounds it is hours.
SECONDS = 60.0

ROWS = {
    "GSM8K": {"question": "Q", "ground_truth_answer": "42"},
    "MMLU-Pro": {"question": "Q\nA. x\nB. y\nC. z", "ground_truth_answer": "C"},
    "ZebraLogic": {
        "question": "Q",
        "ground_truth_answer": {"header": ["House", "Name"], "rows": [["1", "Eric"]]},
    },
    "IFEval": {
        "question": "Q",
        "key": 1,
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["sun"]}],
    },
    "addition": {"question": "2+2=", "answer": "4"},
    "exact_match": {"question": "2+2=", "answer": "4", "marker": "#"},
}


def text_of(kind: str, length: int = LENGTH) -> str:
    return KINDS[kind] * (length // len(KINDS[kind]))


@pytest.mark.parametrize("name", ROWS)
def test_every_text_grader_gets_through(name):
    """Claim: each kind is graded in bounded time, wrong, and without an exception."""
    task, row = get_task(name), ROWS[name]
    task.grade(row, "first")  # imports are not what is measured
    for kind in KINDS:
        start = time.process_time()
        task.grade(row, text_of(kind))
        assert time.process_time() - start < SECONDS, kind


@pytest.mark.parametrize("kind", KINDS)
def test_letters_grids_and_thinking_cost_no_more_than_their_length(kind):
    """Claim: also after an answer phrase, where several patterns meet the same run."""
    start = time.process_time()
    for opening in OPENINGS:
        text = opening + text_of(kind)
        extract_letter(text, "ABCDEFGHIJ")
        extract_letter_strictly(text, "ABCDEFGHIJ")
        options_of(text, "ABCDEFGHIJ")
    first_object(text_of(kind))
    last_grid(text_of(kind))
    without_thinking(without_control_tokens(text_of(kind, 10 * LENGTH)))
    assert time.process_time() - start < SECONDS


def test_instructions_whose_patterns_are_not_linear_have_a_limit(monkeypatch):
    """Claim: lm-eval's pattern for placeholders takes seconds on brackets; the response is given up
    after the limit, flagged and wrong, and the next one is graded as ever."""
    monkeypatch.setattr(instructions, "SECONDS", 0.2)
    task = get_task("IFEval")
    row = {
        "question": "Q",
        "key": 1,
        "instruction_id_list": ["detectable_content:number_placeholders"],
        "kwargs": [{"num_placeholders": 1}],
    }
    start = time.process_time()
    grade = task.grade(row, "[" * LENGTH)
    assert time.process_time() - start < SECONDS
    assert (grade.correct, grade.flags) == (False, ["scorer_timeout"])
    assert task.grade(row, "[one]").correct
