"""The tasks by name. A new task is one file with one ``Task`` and one line here."""

from pathlib import Path

from evaluation.tasks.addition import Addition
from evaluation.tasks.aime_24 import AIME24
from evaluation.tasks.aime_25 import AIME25
from evaluation.tasks.ceval import CEval
from evaluation.tasks.codeforces import Codeforces
from evaluation.tasks.exact_match import ExactMatch
from evaluation.tasks.gpqa_diamond import GPQADiamond
from evaluation.tasks.gsm8k import GSM8K
from evaluation.tasks.humaneval import HumanEval
from evaluation.tasks.ifeval import IFEval
from evaluation.tasks.include_lite import IncludeLite
from evaluation.tasks.livebench import LiveBench
from evaluation.tasks.livecodebench import LiveCodeBench
from evaluation.tasks.lmb_hard import LMBHard
from evaluation.tasks.math_500 import Math500
from evaluation.tasks.mbpp import MBPP
from evaluation.tasks.mlogiqa import MLogiQA
from evaluation.tasks.mmlu import MMLU
from evaluation.tasks.mmlu_pro import MMLUPro
from evaluation.tasks.mmmlu_lite import MMMLULite
from evaluation.tasks.mt_aime2024 import MTAIME2024
from evaluation.tasks.task import NOT_SCORED, SCORER_ERROR, Grade, Row, Task
from evaluation.tasks.training_probes import DAPOMath, GSM8KTrain, MATHTrain, OPDLMTrain
from evaluation.tasks.zebralogic import ZebraLogic
from megatron_opdlm.errors import InputError, nearest

__all__ = [
    "NOT_SCORED",
    "PAPER_TASKS",
    "SCORER_ERROR",
    "Grade",
    "Row",
    "Task",
    "get_task",
    "task_names",
]

# In the paper's order.
_PAPER: tuple[type[Task], ...] = (
    MMLU,
    MMLUPro,
    GPQADiamond,
    IFEval,
    CEval,
    LiveBench,
    GSM8K,
    Math500,
    AIME24,
    AIME25,
    LMBHard,
    ZebraLogic,
    HumanEval,
    MBPP,
    LiveCodeBench,
    Codeforces,
    MMMLULite,
    IncludeLite,
    MTAIME2024,
    MLogiQA,
)
_TASKS: tuple[type[Task], ...] = (
    *_PAPER,
    # Of the training sets.
    OPDLMTrain,
    MATHTrain,
    DAPOMath,
    GSM8KTrain,
    # Ours.
    Addition,
    ExactMatch,
)


PAPER_TASKS = tuple(task().name for task in _PAPER)


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
