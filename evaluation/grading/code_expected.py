"""What the canonical solutions of EvalPlus' problems make of their inputs: the expected values.

They are the benchmark's own, so several share a jail, each in a process of its own, and no response
runs in that jail.
"""

from dataclasses import dataclass
from typing import Any

from evaluation.grading.code_run import LARGEST_BATCH, failed
from evaluation.jail.sandbox import Jail, Sandbox
from evaluation.jail.values import decode, encode

_CANONICAL_SECONDS = 60.0  # of CPU time, to run a solution, and of each call

Problem = dict[str, Any]


class CanonicalFails(Exception):
    """A problem's own solution does not run on its own inputs: nothing can be graded by it."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the canonical solution makes of the inputs of one kind."""

    arguments: list[str]  # the inputs, as a jail takes them
    values: list[Any]
    seconds: list[float]  # CPU time of each


@dataclass(frozen=True, kw_only=True)
class Rights:
    """The expected values of a problem; None: there are none, and ``why`` if there should be."""

    base: Expected | None = None
    plus: Expected | None = None
    why: str = ""


def rights_of(sandbox: Sandbox, problems: list[Problem]) -> list[Rights | None]:
    """Those of each problem; None: the jail was lost over it, twice."""
    done: list[Rights | None] = []

    def go_on(jail: Jail) -> bool:
        for problem in problems[len(done) :]:
            done.append(_rights(jail, problem))
        return True

    while len(done) < len(problems):
        if not sandbox.run(go_on, False):
            done.append(None)
    return done


def _rights(jail: Jail, problem: Problem) -> Rights:
    base = None
    try:
        base = expected_of(jail, problem, problem["base_input"])
        given = problem.get("plus_input")
        return Rights(base=base, plus=expected_of(jail, problem, given) if given else None)
    except CanonicalFails as error:
        return Rights(base=base, why=str(error))


def expected_of(jail: Jail, problem: Problem, inputs: list[Any]) -> Expected:
    """Run the canonical solution. CanonicalFails: with the problem's id and what happened."""
    jail.load(problem["prompt"] + problem["canonical_solution"])
    outcome = jail.start(cpu=_CANONICAL_SECONDS)
    arguments = [encode(list(given)) for given in inputs]
    values, seconds = [], []
    for start in range(0, len(inputs), LARGEST_BATCH):
        if not outcome.ok:
            break
        texts = arguments[start : start + LARGEST_BATCH]
        limits = [_CANONICAL_SECONDS] * len(texts)
        total = sum(limits)
        for outcome in jail.calls(problem["entry_point"], texts, cpu=limits, total=total):
            if outcome.ok:
                values.append(decode(outcome.value))
                seconds.append(outcome.own)  # the benchmark's own program may be believed
    if not outcome.ok:
        raise CanonicalFails(f"{problem['task_id']}: {failed(outcome).detail}")
    return Expected(arguments=arguments, values=values, seconds=seconds)
