"""Golden tables: what is taken out of a response, by the paper's rule and by the strict one."""

import json
import time

import math_verify.parser
import pytest

from evaluation.grading import mathematics
from evaluation.grading.house_grid import first_object, last_grid, solves
from evaluation.grading.mathematics import grade_math
from evaluation.grading.multiple_choice import (
    extract_letter,
    extract_letter_strictly,
    options_of,
    reference_letter,
)
from evaluation.grading.response import without_control_tokens, without_thinking

FOUR, TEN = "ABCD", "ABCDEFGHIJ"

# response, allowed letters, the paper's letter, the strict letter
LETTERS = [
    ('"answer": "C"', FOUR, "C", "C"),
    ('{"answer": "b"}', FOUR, "B", "B"),
    ('"answer": "C. Paris"', FOUR, "C", "C"),
    ("Answer: Because", FOUR, "B", None),  # a word is no choice
    (r"\boxed{Beryllium}", FOUR, "B", None),
    (r"\boxed{\text{c}}", FOUR, "C", "C"),
    (r"\boxed{\textbf{(A)}} is my answer", FOUR, "A", "A"),
    (r"\boxed{D. Because}", FOUR, "D", "D"),
    (r"\boxed{A} no, \boxed{B}", FOUR, "B", "B"),  # the last one wins
    (r"\boxed{1}. Answer: D", FOUR, "D", "D"),  # a box without a letter does not count
    (r"Answer: C. Thus \boxed{A}", FOUR, "A", "A"),  # a box goes before the rest
    (r"\boxed{A}. Answer: C", FOUR, "A", "A"),
    ("**Answer:** D", FOUR, "D", "D"),
    ("answer: A\nanswer: B", FOUR, "B", "B"),
    ("Answer:\n\nC", FOUR, "C", "C"),
    ("ANSWER = d", FOUR, "D", "D"),
    ("Answer: Definitely not A. It must be B", FOUR, "D", "B"),
    ("Answer: The correct option is B", FOUR, "B", "B"),
    ("Answer: I'm not sure", TEN, "I", None),
    ("Answer: A an apple", FOUR, "A", None),
    ("Answer: A because it is", FOUR, "A", "A"),
    ("The correct answer is:\n\n**B**", FOUR, "B", "B"),
    ("answer is option (C).", FOUR, "C", "C"),
    ("the answer is a good one", FOUR, "A", None),
    ("The answer is not clear. C", FOUR, "C", "C"),
    ("The answer isn't A, it is B", FOUR, "B", "B"),
    ("So C is correct. I am sure", TEN, "I", "C"),
    ("I think so.", TEN, "I", None),
    ("So C is correct. I am sure", FOUR, "C", "C"),
    ("Answer: E", FOUR, None, None),
    ("答案是B", TEN, None, "B"),  # a Chinese letter is a word's letter to the paper's rule
    ("答案：B", TEN, "B", "B"),  # noqa: RUF001
    ("The answer is c.", FOUR, "C", "C"),  # lower case counts where it stands alone
    ("answer: c because", FOUR, "C", "C"),
    ("The answer is (b), since", FOUR, "B", "B"),
    ("The answer is d", FOUR, "D", "D"),
    ("The answer is a.", FOUR, "A", "A"),
    ("the answer is a\nvery", FOUR, "A", None),
    ("The answer is a by-product", FOUR, "A", None),
    ("Answer: i.e. this one", TEN, "I", None),
    ("Answer: e.g. this one", TEN, "E", None),
    ("The answer is d/dx", FOUR, "D", None),
    ("The answer is c = 3 m/s", FOUR, "C", None),
    ("Answer: b-cells", FOUR, "B", None),
    ("D. Because A and B are wrong, as is C", FOUR, "C", "D"),  # an option's mark at the start
    ("**D.** Because A is wrong", FOUR, "A", "D"),
    ("(B) Because A is wrong", FOUR, "A", "B"),
    ("D. Rain.\nThe answer is A.", FOUR, "A", "A"),  # stated later
    ("A. Rain\nB. Snow\nSo it is C", FOUR, "C", "C"),  # the options repeated choose nothing
    ("D is wrong, so C", FOUR, "C", "C"),
    ("no letter at all", FOUR, None, None),
    ("", FOUR, None, None),
]

# response, reference, what is extracted, correct, the strict verdict
ANSWERS = [
    (r"so \boxed{42}.", "42", "42", True, True),
    (r"\boxed{\frac{1}{2}}", "0.5", r"\frac{1}{2}", True, True),
    (r"\boxed{0.5}", r"\frac12", None, True, True),
    (r"first \boxed{1}. Later: \boxed{2}", "2", "1,2", False, True),  # near boxes are one set
    (r"first \boxed{1}. Later: \boxed{2}", "1", "1,2", False, False),  # the last one counts
    (r"Step 1: \boxed{3}. Wait, no. So it is \boxed{\frac{1}{2}}", "0.5", None, False, True),
    (r"so $x = \boxed{1}$ or $x = \boxed{2}$", "1,2", "1 and 2", True, True),
    (r"Step 1: \boxed{3}. So \boxed{4}, not \boxed{", "4", "3,4", False, True),
    (r"a set {1,2 and \boxed{3}, or \boxed{4}}", "4", "3,4", False, True),
    (r"The final answer is $\frac{3}{4}$. I hope it is correct. 8", "3/4", r"\frac{3}{4}", True, 1),
    ("The answer is 72.", "72", "72", True, True),
    ("3 and 4 make 7", "7", "7", True, False),  # an unanchored number counts for the paper only
    ("16 - 3 - 4 = 9 eggs, 9 * 2 = $18 a day", "18", "18", True, False),
    ("She earns 1,234 dollars", "1234", "1234", True, False),
    ("She earns 1,234 dollars", "1,234", "1234", True, False),
    (r"\boxed{70,000}", "70000", "70,000", True, True),
    (r"\boxed{18.0}", "18", "18.0", True, True),
    (r"\boxed{\$18}", "18", "18", True, True),
    (r"\boxed{025}", "25", "025", True, True),
    (r"\boxed{x=5}", "5", "x=5", True, True),
    (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", None, True, True),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", None, True, True),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", r"\text{Evelyn}", True, True),
    (r"\boxed{50\%}", "50", None, True, True),
    (r"\boxed{43}", "42", "43", False, False),
    (r"\boxed{unfinished 12", "12", "12", True, False),  # truncated inside the box
    (r"we get 12, then \boxed{", "13", "12", False, False),
    (r"so \fbox{42}, not 43", "42", "43", False, True),
    ("6 a day, so she earns **18** dollars", "18", "18**", False, True),
    ("**Step 1:** 3 * 6 = 18. She earns **\\$18 a day**, not 19", "18", "19", False, True),
    ("**Step 18:** so it is 3", "18", "3", False, False),  # bold, but no number alone
    (r"**18** is not it, but \boxed{19}", "18", "19", False, False),  # a box goes before bold type
    ("no number", "1", None, False, False),
    ("", "1", None, False, False),
    (r"\boxed{}", "0", None, False, False),
]

GRID = {
    "header": ["House", "Name", "Phone Model"],
    "rows": [["1", "Eric", "iPhone 13"], ["2", "Bob", "pixel 6"]],
}
ERIC, BOB = {"Name": "Eric", "Phone Model": "iphone 13"}, {"Name": "Bob", "Phone Model": "pixel 6"}
RIGHT = {"House 1": ERIC, "House 2": BOB}
SWAPPED = {"House 1": BOB, "House 2": ERIC}


def fenced(value: object, language: str = "json") -> str:
    return f"```{language}\n{json.dumps(value)}\n```"


# response, the paper's verdict, the strict verdict
GRIDS = [
    (fenced({"reasoning": "...", "solution": RIGHT}), True, True),
    (json.dumps({"solution": RIGHT}), True, True),
    (json.dumps(RIGHT), True, True),
    (fenced({"solution": RIGHT}, ""), True, True),
    (fenced({"solution": [ERIC, BOB]}), True, True),
    (fenced({"solution": [BOB, ERIC]}), False, False),
    (fenced({"solution": SWAPPED}), False, False),
    (fenced({"solution": {"house 1": ERIC, "house 2": BOB}}), True, True),
    (fenced({"solution": {"House1": ERIC, "house_2": BOB}}), True, True),
    (fenced({"solution": {"1": ERIC, "#2": BOB}}), True, True),
    (fenced({"solution": {"the House 1 (left)": ERIC, "no. 2": BOB}}), True, True),
    (fenced({"solution": {"House 1": ERIC}}), False, False),
    (
        fenced(
            {
                "solution": {
                    "House 1": {"name": " eric ", "phone_model": "IPHONE 13"},
                    "House 2": BOB,
                }
            }
        ),
        True,
        True,
    ),
    (
        fenced(
            {"solution": {"House 1": {"Name": "Eric", "PhoneModel": "iphone 13"}, "House 2": BOB}}
        ),
        True,
        True,
    ),
    (
        fenced({"solution": {"House 1": {"Name": "Eric", "Phone": "iphone 13"}, "House 2": BOB}}),
        True,
        True,
    ),
    (
        fenced(
            {"solution": {"House 1": {"Name": "Eric", "Phone Model": "iphone13"}, "House 2": BOB}}
        ),
        False,
        False,
    ),
    (fenced({"solution": {"House 1": {"Name": "Eric"}, "House 2": BOB}}), False, False),
    (fenced(SWAPPED) + "\nno:\n" + fenced(RIGHT), False, True),  # a draft fence shadows the answer
    (fenced(RIGHT) + "\nno:\n" + fenced(SWAPPED), True, False),
    ('let {x} be. {"House 1": 1}' + json.dumps(RIGHT), False, True),
    ('{"solution": {"House 1": {"Name": "Eric"', False, False),  # truncated
    (f"```json\n{json.dumps({'solution': RIGHT})}", True, True),  # the fence never ends
    (json.dumps({"note": 'a } in "text" {', "solution": RIGHT}), True, True),
    # Braces of a text that open no JSON swallow nothing.
    (r"Houses \{1,2\}." + fenced(RIGHT), True, True),
    ("the set {1,2 hmm" + fenced(RIGHT), True, True),
    (r'a \ and "{" and {"House 1": {' + fenced(RIGHT), True, True),
    (fenced(SWAPPED) + json.dumps(RIGHT) + fenced({"note": 1}), False, True),
    (json.dumps({"1": ERIC, "2": BOB}), True, True),  # numbered houses at the top
    (fenced({"#1": ERIC, "#2": BOB}), True, True),
    (fenced({"1": 2}), False, False),
    ('```json\n{"solution": {"House 1": {"Age": ' + "1" * 5000, False, False),
    ("no grid", False, False),
    ("", False, False),
    ('{"solution": "none"}', False, False),
    ("[1, 2]", False, False),
]


@pytest.mark.parametrize(("response", "letters", "paper", "strict"), LETTERS)
def test_letters(response, letters, paper, strict):
    assert extract_letter(response, letters) == paper
    assert extract_letter_strictly(response, letters) == strict


def test_options_are_read_from_the_question():
    """Both ways in which the data files write them; a question without options allows all."""
    assert options_of("Q?\n(A) x\n(B) y\n(C) z", TEN) == "ABC"
    assert options_of("Q?\nA. x\nB. y", TEN) == "AB"
    assert options_of("Q? I. Newton says", TEN) == TEN
    assert reference_letter(" (b) ") == "B"


@pytest.mark.parametrize(("response", "reference", "extracted", "correct", "strict"), ANSWERS)
def test_mathematical_answers(response, reference, extracted, correct, strict):
    verdict = grade_math(response, reference)
    assert (verdict.correct, verdict.strict) == (correct, bool(strict))
    if extracted is not None:
        assert verdict.extracted == extracted
    assert not verdict.timed_out


@pytest.mark.parametrize(("response", "paper", "strict"), GRIDS)
def test_grids(response, paper, strict):
    assert solves(first_object(response), GRID) == paper
    assert solves(last_grid(response), GRID) == strict


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("8", "8"),
        (" 8\n", " 8\n"),  # an answer without thinking is left as it is
        ("<think>7?</think>\n\n8", "8"),
        ("<think></think>8", "8"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a <think> b</think> c</think> d", "d"),
        ("thoughts that the prompt opened</think>8", "8"),
        ("<think>never ends, 8", None),
        ("<think>a</think>b<think>c", None),
        ("", ""),
    ],
)
def test_thinking_is_no_answer(response, answer):
    """Thinking goes; a block that never ends leaves no answer at all."""
    assert without_thinking(response) == answer


def test_nothing_of_the_engine_reaches_a_grader():
    """Text ends at the first end token, and holds no control token."""
    assert without_control_tokens('"a"<|im_end|><|endoftext|>') == '"a"'
    assert without_control_tokens("a<|MASK|>b<|im_start|>") == "ab"


def test_a_busy_machine_turns_no_right_answer_wrong(monkeypatch):
    """Claim: the limit is CPU time, not the clock's, and what runs into it is tried once more."""
    monkeypatch.setattr(mathematics, "SECONDS", 1)
    real, late = mathematics.parse, [lambda: time.sleep(1.5), lambda: _burn(1.5)]

    def slow(*arguments, **keywords):
        if late:
            math_verify.parser.timeout(keywords["parsing_timeout"])(late.pop())()
        return real(*arguments, **keywords)

    mathematics._warm_up()
    monkeypatch.setattr(mathematics, "parse", slow)
    assert grade_math("\\boxed{\\frac{1}{2}}", "0.5").correct
    assert late == []


def _burn(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
