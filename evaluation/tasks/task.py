"""What a task is: where its rows come from, what a model is asked, and how a response is graded."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from evaluation.jsonl import read_jsonl
from megatron_opdlm.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The verdict on one response."""

    correct: bool
    extracted: str | None  # what was compared; None when the response holds no answer
    flags: list[str] = field(default_factory=list)  # remarks, e.g. "no_answer"


class Task(ABC):
    """One benchmark. A row's ``index`` is its place in the data file, from 0."""

    name: str
    file: str  # file name in the data directory
    how_to_get: ClassVar[str]  # remedy when the file is missing

    def path(self, data_dir: Path) -> Path:
        """The data file. InputError when it is missing: the wanted file and how to get it."""
        path = data_dir / self.file
        if not path.is_file():
            raise InputError(f"task {self.name}: needs {path}, which is missing; {self.how_to_get}")
        return path

    def load(self, data_dir: Path) -> list[Row]:
        """Every row of the data file, checked. InputError: file, row and remedy."""
        path = self.path(data_dir)
        rows = read_jsonl(path, f"task {self.name}:")
        for index, row in enumerate(rows):
            problem = self.problem_of(row)
            if problem:
                raise InputError(f"task {self.name}: {path}: row {index}: {problem}")
        return rows

    @abstractmethod
    def problem_of(self, row: Row) -> str | None:
        """What is wrong with a data row, as ``rule; remedy``; None when it is fine."""

    @abstractmethod
    def prompt(self, row: Row) -> Row:
        """What is asked: one of ``{"messages"}``, ``{"prompt"}`` (raw text), ``{"prompt_ids"}``."""

    @abstractmethod
    def grade(self, row: Row, response: str) -> Grade:
        """Grade one response text, which holds no special tokens."""
