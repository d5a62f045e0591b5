"""Grading that gets through: one response that a scorer fails on does not cost the others.

What a model writes is unbounded, and scorers are other people's programs; whatever they raise, the
response that they raised it on is flagged ``scorer_error`` and counts as wrong.
"""

from evaluation.tasks.task import SCORER_ERROR, Grade, Row, Task
from megatron_opdlm.errors import InputError, RunError


def grade_guarded(task: Task, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
    """``task.grade_all``, whatever the scorer raises.

    A set that fails is graded again in halves until the responses that fail are alone, so a set
    without such is graded once, as a whole. InputError (a bad data row) and RunError (the machine
    lacks something) still end it.
    """
    try:
        return task.grade_all(rows, responses)
    except (InputError, RunError):
        raise
    except Exception as error:  # whatever a scorer raises
        asked = [(row, text) for row, texts in zip(rows, responses, strict=True) for text in texts]
        if len(asked) == 1:
            failed = Grade(
                correct=False, extracted=None, flags=[f"{SCORER_ERROR}: {type(error).__name__}"]
            )
            return [[failed] * len(texts) for texts in responses]
    grades = iter(_grade_halves(task, asked))
    return [[next(grades) for _ in texts] for texts in responses]


def _grade_halves(task: Task, asked: list[tuple[Row, str]]) -> list[Grade]:
    middle = len(asked) // 2
    return [
        grade
        for half in (asked[:middle], asked[middle:])
        if half
        for [grade] in grade_guarded(task, [row for row, _ in half], [[text] for _, text in half])
    ]
