"""The tasks by name. A new task is one file with one ``Task`` and one line here."""

from pathlib import Path

from evaluation.tasks.addition import Addition
from evaluation.tasks.exact_match import ExactMatch
from evaluation.tasks.task import Grade, Row, Task
from megatron_opdlm.errors import InputError, nearest

__all__ = ["Grade", "Row", "Task", "get_task", "task_names"]

_TASKS: tuple[type[Task], ...] = (
    Addition,
    ExactMatch,
)


def task_names() -> list[str]:
    return [*(task().name for task in _TASKS), "exact_match:NAME"]


def get_task(name: str) -> Task:
    """The task of that name: the paper's or its data file's, whatever the case and punctuation;
    ``exact_match:NAME`` reads NAME.jsonl.

    InputError names the known tasks.
    """
    kind, colon, dataset = name.partition(":")
    if kind == "exact_match" and dataset and "/" not in dataset and not dataset.startswith("."):
        return ExactMatch(dataset)
    if kind == "exact_match" and colon:
        raise InputError(
            f"task {name!r}: {dataset!r} is not a plain file name; use exact_match:NAME"
        )
    for kind_of_task in _TASKS:
        task = kind_of_task()
        if task.is_called(name):
            return task
    raise InputError(f"task {name!r}: not known; use {', '.join(task_names())}{_nearest(name)}")


def _nearest(name: str) -> str:
    """Suggestion for a mistyped name, by either of the names that a task has, in any case."""
    tasks = [task() for task in _TASKS]
    names = [known for task in tasks for known in (task.name, Path(task.file).stem)]
    return nearest(name, [*names, *(known.lower() for known in names)])
