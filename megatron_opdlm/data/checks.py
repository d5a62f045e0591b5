"""What is wrong with training rows as a set: copies of each other, and of evaluation problems."""

import contextlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.data.chat import with_messages
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.data.sources import TRAINING_SETS
from megatron_opdlm.errors import InputError

_WORD = re.compile(r"\w", re.UNICODE)
# Scripts without blanks between words: every letter counts as a word of its own.
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_SUFFIXES = (".json", ".jsonl", ".parquet")
MANIFEST = ".manifest.json"  # beside a file that was prepared for training


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, in Unicode's compatibility form."""
    plain = unicodedata.normalize("NFKC", text).lower()
    spaced = _UNSPACED.sub(r" \1 ", plain)
    kept = "".join(letter if _WORD.match(letter) else " " for letter in spaced)
    return kept.split()


def ngrams(text: str, n: int) -> set[int]:
    """Hashes of all runs of ``n`` words. A text of fewer words is one run, of all of them."""
    own = words(text)
    runs = [own[i : i + n] for i in range(len(own) - n + 1)] or ([own] if own else [])
    return {hash(tuple(run)) for run in runs}


class EvaluationProblems:
    """The n-grams of the questions in a directory of evaluation data."""

    def __init__(self, n: int) -> None:
        self.n, self._files = n, []
        self.passed_over: list[str] = []  # training sets that lie among the evaluation data
        self._long: dict[int, int] = {}  # hash of n words -> file
        self._short: dict[tuple[str, ...], int] = {}  # whole questions of fewer words

    @classmethod
    def read(cls, files: Sequence[Path], n: int, source: Path) -> "EvaluationProblems":
        """What every row of every file asks by. Training sets are passed over, ``source`` (what is
        being prepared) under whatever name: all of it would overlap.
        """
        problems = cls(n)
        for path in files:
            if is_training_set(path) or _same_content(path, source):
                problems.passed_over.append(path.name)
            else:
                problems.add(path.name, questions(path))
        if not problems._files:
            raise InputError(
                f"--evaluation-data {files[0].parent}: holds nothing but training sets "
                f"({', '.join(problems.passed_over)}); give the directory of the benchmarks"
            )
        return problems

    def add(self, name: str, texts: Iterable[str]) -> None:
        self._files.append(name)
        file = len(self._files) - 1
        for text in texts:
            own = words(text)
            if len(own) >= self.n:
                for gram in ngrams(text, self.n):
                    self._long.setdefault(gram, file)
            elif own:
                self._short.setdefault(tuple(own), file)

    def file_of(self, text: str) -> str | None:
        """The evaluation file that shares n words in a row with the text, or whose whole (shorter)
        question the text is; None: none does."""
        own = words(text)
        if tuple(own) in self._short:
            return self._files[self._short[tuple(own)]]
        if len(own) < self.n:
            return None
        shared = [self._long[gram] for gram in ngrams(text, self.n) if gram in self._long]
        return self._files[min(shared)] if shared else None


def evaluation_files(directory: Path) -> list[Path]:
    """The data files of a directory, without manifests. InputError where there is none."""
    if not directory.is_dir():
        raise InputError(f"--evaluation-data {directory}: no such directory")
    found = (path for path in sorted(directory.iterdir()) if path.suffix in _SUFFIXES)
    files = [path for path in found if not path.name.endswith(MANIFEST)]
    if not files:
        raise InputError(f"--evaluation-data {directory}: holds no .json, .jsonl or .parquet")
    return files


def is_training_set(path: Path) -> bool:
    """By the name that a training set is published under, or by the manifest of a prepared one."""
    return path.stem in TRAINING_SETS or path.with_name(path.name + MANIFEST).exists()


def _same_content(path: Path, source: Path) -> bool:
    if not source.is_file() or path.stat().st_size != source.stat().st_size:
        return False
    return content_hash(path) == content_hash(source)


def questions(path: Path) -> Iterator[str]:
    """What the rows of an evaluation file ask."""
    for row in read_rows(path, "--evaluation-data"):
        text = question_of(row.fields)
        if text:
            yield text


def question_of(fields: dict[str, Any]) -> str:
    """The text that a row asks by; empty where it has token ids only."""
    with contextlib.suppress(InputError):  # a row of another kind is compared by what it has
        fields = with_messages(fields)
    if isinstance(fields.get("messages"), list):
        turns = (turn for turn in fields["messages"] if isinstance(turn, dict))
        return "\n".join(str(t.get("content", "")) for t in turns if t.get("role") == "user")
    text = fields.get("question", fields.get("prompt"))
    return text if isinstance(text, str) else ""


@dataclass(frozen=True)
class Identity:
    """What two rows must share to be the same: all that the model is asked, and the response."""

    prompt: tuple[Any, ...]  # token ids, or the turns
    response: str | None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Identity":
        """The identity of a checked row."""
        return cls(prompt=_prompt_of(fields), response=fields.get("response"))

    @property
    def folded(self) -> "Identity":
        """But for case and the width of blanks in what is asked. Symbols stay: 5-3 is not 5+3."""
        return Identity(prompt=tuple(map(_folded, self.prompt)), response=self.response)


@dataclass(frozen=True)
class _Turn:
    role: str  # empty: text without a chat template
    content: str
    other: str  # what else a template may read of it


def _prompt_of(fields: dict[str, Any]) -> tuple[Any, ...]:
    if "prompt_ids" in fields:
        return tuple(fields["prompt_ids"])
    if "messages" in fields:
        return tuple(_turn(**message) for message in fields["messages"])
    if "question" in fields:
        system = [_turn("system", fields["system"])] if "system" in fields else []
        return (*system, _turn("user", fields["question"]))
    return (_turn("", fields["prompt"]),)


def _turn(role: str, content: str, **other: Any) -> _Turn:
    return _Turn(role, content, json.dumps(other, sort_keys=True, default=str))


def _folded(part: Any) -> Any:
    if not isinstance(part, _Turn):
        return part
    return _Turn(part.role, " ".join(part.content.lower().split()), part.other)


def duplicates(rows: Sequence[Identity]) -> tuple[list[int], list[int]]:
    """Places of rows that repeat an earlier one exactly, and of those that repeat one but for case
    and blanks.
    """
    seen: set[Identity] = set()
    loosely: set[Identity] = set()
    exact, normalised = [], []
    for place, row in enumerate(rows):
        folded = row.folded
        if row in seen:
            exact.append(place)
        elif folded in loosely:
            normalised.append(place)
        seen.add(row)
        loosely.add(folded)
    return exact, normalised
