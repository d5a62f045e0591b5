"""What a task is: where its rows come from, what a model is asked, and how responses are graded."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from evaluation.jsonl import read_rows
from evaluation.tasks.public_files import form_of
from megatron_opdlm.errors import InputError

Row = dict[str, Any]
NOT_SCORED = "not_scored"  # flag of a response to a row without a verifiable answer
SCORER_ERROR = "scorer_error"  # flag, with what failed: the scorer did not get through a response


def plain_name(name: str) -> str:
    """A task's name without case and punctuation: MATH-500, MATH500 and math_500 are one.

    ``exact_match:NAME`` keeps NAME, which is a file's.
    """
    kind, colon, rest = name.partition(":")
    return re.sub(r"[^a-z0-9]", "", kind.lower()) + colon + rest


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The verdict on one response.

    ``correct`` is by the paper's rule. ``strict`` is by the rule without its known faults, where a
    task has one; None: it has one rule only. ``scores`` are other figures between 0 and 1 by name,
    e.g. ``{"plus": 1.0}``; a summary holds their means over problems as ``accuracy_plus``. A score
    that has a weight is a share of so many things, and its mean is over all of these instead.
    A response flagged ``not_scored`` counts neither as right nor as wrong.
    """

    correct: bool
    extracted: str | None  # what was compared; None when the response holds no answer
    flags: list[str] = field(default_factory=list)  # remarks, e.g. "no_answer"
    strict: bool | None = None
    scores: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)


class Task(ABC):
    """One benchmark. A row's ``index`` is its place in the data file, from 0."""

    name: str  # as the paper and the tables have it
    file: str  # file name in the data directory: .json holds a list, .jsonl an object a line
    how_to_get: ClassVar[str]  # remedy when the file is missing
    samples_pass_at_k: ClassVar[bool] = False  # whether pass@k is reported (code)
    may_think: ClassVar[bool] = True  # False: asked without thinking whatever the user says

    def path(self, data_dir: Path) -> Path:
        """The data file. InputError when it is missing: the wanted file and how to get it."""
        path = data_dir / self.file
        if not path.is_file():
            raise InputError(f"task {self.name}: needs {path}, which is missing; {self.how_to_get}")
        return path

    def load(self, data_dir: Path) -> list[Row]:
        """Every row of the data file, checked. InputError: file, row and remedy."""
        path = self.path(data_dir)
        rows = read_rows(path, f"task {self.name}:")
        for index, row in enumerate(rows):
            problem = self.problem_of(row)
            if problem and form_of(self.name, row):
                problem = (
                    "is of the public file, not of the paper's; convert it: python -m "
                    f"evaluation.download --data NEW_DIR --tasks {self.name} --from {path}"
                )
            if problem:
                raise InputError(f"task {self.name}: {path}: row {index}: {problem}")
        return rows

    def is_called(self, name: object) -> bool:
        """Whether a user means this task: its name or its file's, however they are punctuated."""
        own = {plain_name(self.name), plain_name(Path(self.file).stem)}
        return isinstance(name, str) and plain_name(name) in own

    def missing(self, rows: list[Row]) -> str | None:
        """What this machine lacks to grade these rows, as ``what; how to install it``; None when
        nothing is missing.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """How this task is graded here, for the summary's ``settings``: e.g. the sandbox."""
        return {}

    def division(self, row: Row) -> str | None:
        """The language, subject or category whose accuracy is reported apart; None: the row has
        none.
        """
        name = row.get("subdivision")
        return name if isinstance(name, str) else None

    @abstractmethod
    def problem_of(self, row: Row) -> str | None:
        """What is wrong with a data row, as ``rule; remedy``; None when it is fine."""

    @abstractmethod
    def prompt(self, row: Row) -> Row:
        """What is asked: one of ``{"messages"}``, ``{"prompt"}`` (raw text), ``{"prompt_ids"}``.

        Messages that end with an assistant turn are continued inside that turn (a prefill).
        """

    @abstractmethod
    def grade(self, row: Row, response: str) -> Grade:
        """Grade one response text, which holds no special tokens and no thinking."""

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        """Grade whole sets: ``responses[i]`` are those to ``rows[i]``, possibly none.

        Returns the grades in the same shape. A task whose grading is expensive overrides this and
        works on all of them at once.
        """
        return [
            [self.grade(row, response) for response in texts]
            for row, texts in zip(rows, responses, strict=True)
        ]
