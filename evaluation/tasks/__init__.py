"""The tasks by name. A new task is one file with one ``Task`` and one line here."""

from evaluation.tasks.addition import Addition
from evaluation.tasks.exact_match import ExactMatch
from evaluation.tasks.task import Grade, Row, Task
from megatron_opdlm.errors import InputError, nearest

__all__ = ["Grade", "Row", "Task", "get_task", "task_names"]

_TASKS = {"addition": Addition, "exact_match": ExactMatch}


def task_names() -> list[str]:
    return [*_TASKS, "exact_match:NAME"]


def get_task(name: str) -> Task:
    """The task of that name; ``exact_match:NAME`` reads NAME.jsonl.

    InputError names the known tasks.
    """
    if name in _TASKS:
        return _TASKS[name]()
    kind, colon, dataset = name.partition(":")
    if kind == "exact_match" and dataset and "/" not in dataset and not dataset.startswith("."):
        return ExactMatch(dataset)
    if kind == "exact_match" and colon:
        raise InputError(
            f"task {name!r}: {dataset!r} is not a plain file name; use exact_match:NAME"
        )
    known = ", ".join(task_names())
    raise InputError(f"task {name!r}: not known; use {known}{nearest(name, _TASKS)}")
