"""Mathematical answers: found and compared by math-verify, as the paper's evaluation does.

The rightmost answer of the best kind counts: "the final answer is ...", then ``\\boxed{...}``, then
anchored and bare expressions. Because bare ones are allowed, a response that breaks off yields its
last number; the strict verdict therefore asks for an anchor, a box or, without one, bold type.
Boxes that stand near each other are one answer of several values to math-verify; to the strict
verdict the last one alone is right too.
"""

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import math_verify.grader
import math_verify.parser
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from evaluation.grading.scorer_process import Job, score_all

# math-verify's own limit is 5 s by the clock; ours is CPU time, so that a busy machine turns no
# right answer wrong.
SECONDS, _WARM_UP_SECONDS = 10, 60
# Responses are graded in this process, one after the other, up to this number; beyond it in
# children, of which each takes seconds to start and at least this many.
IN_SERIES = 256
_KILL_SECONDS = 15 * SECONDS  # for all steps of a response; a child that takes longer hangs

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # one that is escaped is a sign of a set
_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{")
# A number in bold, perhaps with a currency before it or a unit after it.
_BOLD = re.compile(
    r"\*\*\s*+(?:\\?\$|[€£])?(-?\d[\d,]*+(?:\.\d++)?(?:/\d++)?)[%A-Za-z \\$]{0,40}\.?\*\*"
)
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
    strict: bool  # right, and boxed, announced as the answer or, without a box, in bold
    timed_out: bool  # the scorer gave up; ``correct`` is then False
    error: str | None = None  # what a child failed with, if not with the time


def grade_math(response: str, reference: str) -> MathVerdict:
    """Compare the answer in a response with the reference, both read as LaTeX in a box.

    Once more after a time-out. Needs the main thread: the time limit is kept by a signal.
    """
    _warm_up()
    verdict = _graded(response, reference)
    return _graded(response, reference) if verdict.timed_out else verdict


@cache
def _warm_up() -> None:
    """The first LaTeX that a process parses takes a large part of a second more, off the clock."""
    parse("\\boxed{\\frac{1}{2}}", _LATEX, parsing_timeout=_WARM_UP_SECONDS)


def _graded(response: str, reference: str) -> MathVerdict:
    start = time.process_time()
    try:
        extracted = extract_math(response)
        correct = extracted is not None and same_value(extracted, reference)
        strict = correct and bool(_parsed(response, _ANCHORED))
        if not strict:
            shown = last_box(response) or last_bold(response)
            strict = shown is not None and same_value(shown, reference)
    except TimeoutException:
        return MathVerdict(extracted=None, correct=False, strict=False, timed_out=True)
    return MathVerdict(
        extracted=extracted,
        correct=correct,
        strict=strict,
        timed_out=not correct and time.process_time() - start >= SECONDS,
    )


def grade_all_math(responses: list[str], references: list[str]) -> list[MathVerdict]:
    """``grade_math`` of each response with its reference; many of them over all cores."""
    if len(responses) <= IN_SERIES:
        return [grade_math(*pair) for pair in zip(responses, references, strict=True)]
    jobs = [
        Job(row={"reference": reference}, response=text, seconds=_KILL_SECONDS, scorer=_IN_CHILD)
        for text, reference in zip(responses, references, strict=True)
    ]
    workers = min(os.cpu_count() or 1, -(-len(jobs) // IN_SERIES))
    return [
        MathVerdict(**outcome.score) if outcome.error is None else _ungraded(outcome.error)
        for outcome in score_all(jobs, workers)
    ]


_IN_CHILD = "evaluation.grading.mathematics:verdict_of"


def _ungraded(error: str) -> MathVerdict:
    late = error == "timeout"
    return MathVerdict(
        extracted=None,
        correct=False,
        strict=False,
        timed_out=late,
        error=None if late else error,
    )


def verdict_of(row: dict[str, Any], response: str) -> dict[str, Any]:
    """What a child answers: ``MathVerdict`` as JSON."""
    return asdict(grade_math(response, row["reference"]))


def last_box(response: str) -> str | None:
    """What stands in the last box that is closed; None without one.

    >>> last_box("\\boxed{3}? No: \\boxed{\\frac{1}{2}}, not \\boxed{")
    '\\frac{1}{2}'
    """
    open_at, last, found = [], -1, None
    starts = {match.end() - 1 for match in _BOX.finditer(response)}
    for brace in _BRACE.finditer(response):
        if brace[0] == "{":
            open_at.append(brace.start())
        elif brace[0] == "}" and open_at:
            start = open_at.pop()
            if start in starts and start > last:
                last, found = start, response[start + 1 : brace.start()]
    return found


def last_bold(response: str) -> str | None:
    """The number that is last set in bold; None without one.

    >>> last_bold("**Step 1** makes **12**, so she earns **$18 a day**.")
    '18'
    """
    found = _BOLD.findall(response)
    return found[-1] if found else None


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


def _cpu_limit(timeout_seconds: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """In the place of math-verify's decorator, which counts by the clock: TimeoutException after so
    many seconds of this process' CPU time.
    """

    def stop(*_: object) -> None:
        raise TimeoutException("Operation timed out!")

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before = signal.signal(signal.SIGPROF, stop)
            signal.setitimer(signal.ITIMER_PROF, timeout_seconds)
            try:
                return function(*arguments, **keywords)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.signal(signal.SIGPROF, before)

        return call

    return limited


math_verify.parser.timeout = math_verify.grader.timeout = _cpu_limit
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it prints whole responses
