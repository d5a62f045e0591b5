"""Mathematical answers: found and compared by math-verify, as the paper's evaluation does.

The rightmost answer of the best kind counts: "the final answer is ...", then ``\\boxed{...}``, then
anchored and bare expressions. Because bare ones are allowed, a response that breaks off yields its
last number; the strict verdict therefore asks for an anchor.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

# math-verify's own limit is 5 s by the clock; a busy machine should not turn a right answer wrong.
SECONDS = 10

_ANY = (ExprExtractionConfig(), LatexExtractionConfig())
_ANCHORED = (
    ExprExtractionConfig(try_extract_without_anchor=False),
    LatexExtractionConfig(try_extract_without_anchor=False),
)
_LATEX = (LatexExtractionConfig(),)


@dataclass(frozen=True, kw_only=True)
class MathVerdict:
    """How a response compares with the reference answer."""

    extracted: str | None  # as the response writes it
    correct: bool
    anchored: bool  # boxed, or announced as the answer
    timed_out: bool  # the scorer gave up; ``correct`` is then False


def grade_math(response: str, reference: str) -> MathVerdict:
    """Compare the answer in a response with the reference, both read as LaTeX in a box.

    Needs the main thread: math-verify keeps its time limit by a signal.
    """
    start = time.monotonic()
    try:
        extracted = extract_math(response)
        correct = extracted is not None and same_value(extracted, reference)
        anchored = correct and bool(_parsed(response, _ANCHORED))
    except TimeoutException:
        return MathVerdict(extracted=None, correct=False, anchored=False, timed_out=True)
    return MathVerdict(
        extracted=extracted,
        correct=correct,
        anchored=anchored,
        timed_out=not correct and time.monotonic() - start >= SECONDS,
    )


def extract_math(response: str) -> str | None:
    """The answer as the response writes it, without its box; None when there is none.

    >>> extract_math("so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    found = _parsed(response, _ANY)
    return str(found[1] if len(found) > 1 else found[0]) if found else None


def same_value(answer: str, reference: str) -> bool:
    """Whether two answers are equal to math-verify, which rounds to 6 digits."""
    expected = _parsed(f"\\boxed{{{reference}}}", _LATEX)
    given = _parsed(f"\\boxed{{{answer}}}", _LATEX)
    # It goes on after a pair of readings that fails or takes too long, and says nothing.
    return bool(verify(expected, given, timeout_seconds=SECONDS))


def _parsed(text: str, targets: tuple[Any, ...]) -> list[Any]:
    """``[value, its text]``, or fewer. TimeoutException when it takes too long."""
    try:
        return parse(text, targets, parsing_timeout=SECONDS, raise_on_error=True)
    except Exception:  # sympy raises nearly anything on odd input; TimeoutException is none of it
        return []


logging.getLogger("math_verify").setLevel(logging.ERROR)  # it prints whole responses
