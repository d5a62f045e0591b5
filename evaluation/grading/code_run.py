"""Programs against tests: one verdict a program; its tests run until the first failure."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evaluation.jail.sandbox import Jail, Outcome
from evaluation.jail.values import decode


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``status``: ``passed``, ``wrong_answer``, ``timeout``, ``runtime_error`` or ``sandbox_lost``.

    ``detail`` says more, e.g. how the program ended. ``cpu_seconds`` of each test that ran.
    """

    status: str
    passed: int = 0  # tests before the first failure
    detail: str = ""
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        return self.status == "passed"


LARGEST_BATCH = 256  # calls in one request; they begin with one and double
LOST = Verdict(status="sandbox_lost")


def failed(outcome: Outcome, passed: int = 0) -> Verdict:
    """The verdict on a program that did not get as far as an answer."""
    status = "timeout" if outcome.status in ("cpu_time", "wall_time") else "runtime_error"
    detail = f"{outcome.status} {outcome.detail or outcome.stderr.strip()[-200:]}".strip()
    return Verdict(status=status, passed=passed, detail=detail)


@dataclass(frozen=True, kw_only=True)
class InputOutput:
    """A test of a program that reads standard input and prints."""

    given: str
    expected: str


def run_stdio(
    jail: Jail,
    source: str,
    tests: list[InputOutput],
    *,
    cpu: float,
    same: Callable[[str, str], bool],
    prompts: bool = True,
) -> Verdict:
    """Every test in a process of its own, ``cpu`` seconds each.

    ``prompts``: whether the texts that a program gives to ``input`` are part of its output.
    """
    jail.load(source)
    seconds: list[float] = []
    for passed, test in enumerate(tests):
        outcome = jail.stdio(test.given, cpu=cpu, prompts=prompts)
        if not outcome.ok:
            return failed(outcome, passed)
        if not same(outcome.stdout, test.expected):
            return Verdict(status="wrong_answer", passed=passed, detail=outcome.stdout[:200])
        seconds.append(outcome.cpu_seconds)
    return Verdict(status="passed", passed=len(tests), cpu_seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class FunctionCall:
    """A test of a function: is the value of these arguments right?"""

    arguments: str  # a list, as ``evaluation.jail.values.encode`` writes it
    is_right: Callable[[Any], bool]
    cpu: float


def run_calls(
    jail: Jail,
    source: str,
    function: str,
    tests: list[FunctionCall],
    *,
    cpu: float,
    total: float = math.inf,
    within: str | None = None,
) -> Verdict:
    """Every test in one process. ``cpu``: seconds to run the definitions; ``total``: to run these
    and all tests.

    ``within``: a class whose method is called if the program defines it.
    """
    jail.load(source)
    outcome = jail.start(cpu=min(cpu, total))
    if not outcome.ok:
        return failed(outcome)
    seconds: list[float] = []
    left = total - outcome.cpu_seconds
    size = 1
    while len(seconds) < len(tests):
        if left <= 0:
            detail = f"all tests together took more than {total:g} s"
            return Verdict(status="timeout", passed=len(seconds), detail=detail)
        batch = tests[len(seconds) :][:size]
        outcomes = jail.calls(
            function,
            [test.arguments for test in batch],
            cpu=[min(test.cpu, left) for test in batch],
            total=left,
            within=within,
        )
        for test, outcome in zip(batch, outcomes, strict=False):  # which end at a failure
            if not outcome.ok:
                return failed(outcome, len(seconds))
            if not _is_right(test, outcome.value):
                detail = outcome.value[:200]
                return Verdict(status="wrong_answer", passed=len(seconds), detail=detail)
            seconds.append(outcome.cpu_seconds)
            left -= outcome.cpu_seconds
        size = min(2 * size, LARGEST_BATCH)
    return Verdict(status="passed", passed=len(tests), cpu_seconds=seconds)


def _is_right(test: FunctionCall, text: str) -> bool:
    try:
        return bool(test.is_right(decode(text)))
    except Exception:  # a value that the comparison was not made for, e.g. a list for a number
        return False


def run_tests(
    jail: Jail,
    source: str,
    *,
    setup: list[str],
    functions: list[str],
    snippets: list[str],
    cpu: float,
    collect: bool = False,
) -> Verdict:
    """Test code against a program, ``cpu`` seconds in all (``Jail.judge``)."""
    jail.load(source)
    outcome = jail.judge(
        setup=setup, functions=functions, snippets=snippets, collect=collect, cpu=cpu
    )
    if not outcome.ok:
        return failed(outcome)
    if outcome.failure is None:
        return Verdict(status="passed", passed=outcome.passed)
    wrong = outcome.failure.startswith("AssertionError")
    status = "wrong_answer" if wrong else "runtime_error"
    return Verdict(status=status, passed=outcome.passed, detail=outcome.failure)
