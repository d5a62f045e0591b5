"""What a collapsed model writes: one thing, thousands of times. No grader may hang on it.

Costs are in processor time of this process, and compared over lengths: what these tests are to find
grows with the square or the cube of the length.
"""

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from evaluation.grading import instructions
from evaluation.grading.house_grid import first_object, last_grid
from evaluation.grading.multiple_choice import extract_letter, extract_letter_strictly, options_of
from evaluation.grading.response import without_control_tokens, without_thinking
from evaluation.tasks import get_task

SHORT, LONG = 5_000, 40_000
# What grows as the length costs 8 times as much, what grows as its square 64 times.
MOST = 32
NOISE = 0.2  # seconds
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


@pytest.fixture(autouse=True)
def recursion_limit() -> Iterator[None]:
    """As libraries raise it for the whole process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(before)


def text_of(kind: str, length: int) -> str:
    return KINDS[kind] * (length // len(KINDS[kind]))


def assert_grows_as_the_length(act: Callable[[int], object]) -> None:
    seconds = []
    for length in (SHORT, LONG):
        start = time.process_time()
        act(length)
        seconds.append(time.process_time() - start)
    assert seconds[1] < MOST * seconds[0] + NOISE, seconds


@pytest.mark.parametrize("name", ROWS)
def test_every_text_grader_gets_through(name: str, subtests: pytest.Subtests):
    """Claim: each kind is graded, wrong, without an exception, and at a cost that does not grow
    faster than its length."""
    task, row = get_task(name), ROWS[name]
    task.grade(row, "first")  # imports are not what is measured
    for kind in KINDS:
        with subtests.test(kind=kind):
            assert_grows_as_the_length(
                lambda length, kind=kind: task.grade(row, text_of(kind, length))
            )
            assert not task.grade(row, text_of(kind, SHORT)).correct


@pytest.mark.parametrize("kind", KINDS)
def test_letters_grids_and_thinking_cost_no_more_than_their_length(kind: str):
    """Claim: also after an answer phrase, where several patterns meet the same run."""

    def act(length: int) -> None:
        for opening in OPENINGS:
            text = opening + text_of(kind, length)
            extract_letter(text, "ABCDEFGHIJ")
            extract_letter_strictly(text, "ABCDEFGHIJ")
            options_of(text, "ABCDEFGHIJ")
        first_object(text_of(kind, length))
        last_grid(text_of(kind, length))
        without_thinking(without_control_tokens(text_of(kind, 10 * length)))

    assert_grows_as_the_length(act)


def test_instructions_whose_patterns_are_not_linear_have_a_limit(monkeypatch: pytest.MonkeyPatch):
    """Claim: lm-eval's pattern for placeholders takes seconds on brackets; the response is given up
    after the limit, flagged and wrong, and the next one is graded as ever."""
    limit = 0.2
    monkeypatch.setattr(instructions, "SECONDS", limit)
    task = get_task("IFEval")
    row = {
        "question": "Q",
        "key": 1,
        "instruction_id_list": ["detectable_content:number_placeholders"],
        "kwargs": [{"num_placeholders": 1}],
    }
    assert task.grade(row, "[one]").correct
    start = time.process_time()
    grade = task.grade(row, "[" * LONG)
    assert time.process_time() - start < 10 * limit
    assert (grade.correct, grade.flags) == (False, ["scorer_timeout"])
    assert task.grade(row, "[one]").correct
