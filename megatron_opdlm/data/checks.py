"""What is wrong with training rows as a set: copies of each other, and of evaluation problems."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.errors import InputError

_WORD = re.compile(r"\w", re.UNICODE)
# Scripts without blanks between words: every letter counts as a word of its own.
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_SUFFIXES = (".json", ".jsonl", ".parquet")


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
        self._long: dict[int, int] = {}  # hash of n words -> file
        self._short: dict[tuple[str, ...], int] = {}  # whole questions of fewer words

    @classmethod
    def read(cls, directory: Path, n: int) -> "EvaluationProblems":
        """What every row of every data file asks by; manifests are passed over."""
        if not directory.is_dir():
            raise InputError(f"--evaluation-data {directory}: no such directory")
        problems = cls(n)
        for path in sorted(p for p in directory.iterdir() if p.suffix in _SUFFIXES):
            if path.name.endswith(".manifest.json"):
                continue
            problems.add(path.name, questions(path))
        if not problems._files:
            raise InputError(f"--evaluation-data {directory}: holds no .json, .jsonl or .parquet")
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


def questions(path: Path) -> Iterator[str]:
    """What the rows of an evaluation file ask."""
    for row in read_rows(path, "--evaluation-data"):
        text = question_of(row.fields)
        if text:
            yield text


def question_of(fields: dict[str, Any]) -> str:
    """The text that a row asks by; empty where it has token ids only."""
    if isinstance(fields.get("messages"), list):
        turns = (turn for turn in fields["messages"] if isinstance(turn, dict))
        return "\n".join(str(t.get("content", "")) for t in turns if t.get("role") == "user")
    text = fields.get("question", fields.get("prompt"))
    return text if isinstance(text, str) else ""


def duplicates(texts: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Places of rows that repeat an earlier one exactly, and of those that repeat one but for
    case, blanks and punctuation. A text may be anything hashable; strings are compared loosely.
    """
    seen: set[Any] = set()
    loosely: set[Any] = set()
    exact, normalised = [], []
    for place, text in enumerate(texts):
        loose = (tuple(words(text)) or text) if isinstance(text, str) else text
        if text in seen:
            exact.append(place)
        elif loose in loosely:
            normalised.append(place)
        seen.add(text)
        loosely.add(loose)
    return exact, normalised
