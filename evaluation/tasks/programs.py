"""Whole sets of responses, graded in parallel: a jail each, a verdict each."""

from collections.abc import Callable
from typing import Any, TypeVar

from evaluation.grading.code_run import LOST, Verdict
from evaluation.jail.sandbox import Jail, Sandbox
from evaluation.tasks.task import Grade, Row

Item = TypeVar("Item")


def grade_programs(
    sandbox: Sandbox,
    rows: list[Row],
    programs: list[list[str]],
    check: Callable[[Jail, Row, str], Verdict],
) -> list[list[Grade]]:
    """Grades in the shape of ``programs``; an empty program is no answer and does not run."""
    places = [(i, j) for i, texts in enumerate(programs) for j, text in enumerate(texts) if text]

    def verdict_at(place: tuple[int, int]) -> Verdict:
        row, program = rows[place[0]], programs[place[0]][place[1]]
        return sandbox.run(lambda jail: check(jail, row, program), LOST)

    verdicts = dict(zip(places, sandbox.map(verdict_at, places), strict=True))
    return [
        [grade_of(program, verdicts.get((i, j))) for j, program in enumerate(texts)]
        for i, texts in enumerate(programs)
    ]


def grade_of(
    program: str, verdict: Verdict | None, problem: str | None = None, **more: Any
) -> Grade:
    """A grade whose flags say how a program failed; None: there was no program.

    ``problem``: why nothing was extracted, where that is not the response's doing alone; a lost
    sandbox says nothing about the response.
    """
    if problem == LOST.status:
        return Grade(correct=False, extracted=None, flags=[LOST.status], **more)
    if verdict is None:
        flags = ["no_answer", *([problem] if problem else [])]
        return Grade(correct=False, extracted=None, flags=flags, **more)
    flags = [] if verdict.correct else [verdict.status]
    return Grade(correct=verdict.correct, extracted=program, flags=flags, **more)
