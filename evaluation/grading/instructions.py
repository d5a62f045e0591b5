"""IFEval: whether a response keeps every instruction, by lm-evaluation-harness' own checkers.

Two of the instructions need sentences: a number of sentences, and words in capitals. The harness
splits with NLTK's trained Punkt data and downloads it when it is imported. Here nothing is
downloaded while grading: where the data is not on the machine, an untrained Punkt splitter that
knows common abbreviations stands in, and the responses that it judges are flagged.

Where the data's letter is a sign, the harness draws a letter in its place, and so it does wherever
an argument is missing: the draws are seeded by the row's key, so that a verdict is always the same.

Some of the harness' patterns take time that grows with the square of a response without words, so
the checks of a response have a limit, in processor time: a busy machine changes no verdict.
"""

import functools
import importlib
import io
import random
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDS = ("lm_eval", "langdetect", "immutabledict", "nltk")
NEED_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")

SECONDS = 20.0  # of processor time, for all checks of one response

# Common abbreviations after which a sentence goes on, as Punkt writes them.
_ABBREVIATIONS = (
    *("dr", "mr", "mrs", "ms", "prof", "st", "jr", "sr", "vs", "etc", "inc", "ltd", "co", "corp"),
    *("e.g", "i.e", "u.s", "u.k", "a.m", "p.m", "ph.d", "no", "fig", "gen", "sen", "rep", "gov"),
    *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"),
)


@dataclass(frozen=True, kw_only=True)
class InstructionVerdict:
    """Which instructions of a row a response keeps."""

    strict: list[bool]  # an entry an instruction
    loose: list[bool]  # any of eight trimmed readings of the response may keep it
    approximate: bool  # a sentence splitter stood in for the harness' own
    timed_out: bool = False  # the checks took too long: nothing counts as kept


def missing_packages() -> list[str]:
    """The packages that the checkers need and this machine lacks."""
    return [name for name in NEEDS if find_spec(name) is None]


def use_nltk_data(directory: Path) -> None:
    """Look for Punkt's data in a directory too (``tokenizers/punkt_tab`` under it)."""
    import nltk

    if directory.is_dir() and str(directory) not in nltk.data.path:
        nltk.data.path.insert(0, str(directory))
        _checkers.cache_clear()


def known_instructions() -> set[str]:
    """Ids of the instructions that can be checked."""
    return set(_checkers().module.instructions_registry.INSTRUCTION_DICT)


def check_instructions(
    prompt: str,
    ids: list[str],
    arguments: list[dict[str, Any] | None],
    response: str,
    *,
    key: int,
) -> InstructionVerdict:
    """Check one response. ``arguments[i]`` go with ``ids[i]``; those that are None are left out.
    ``key``: the row's, which seeds what the checkers draw.
    """
    checkers = _checkers()
    example = checkers.module.InputExample(
        key=key,
        instruction_id_list=ids,
        prompt=prompt,
        kwargs=[_given(each) for each in arguments],
    )
    try:
        with _limited(SECONDS):
            with _seeded(key):
                strict = checkers.module.test_instruction_following_strict(example, response)
            with _seeded(key):
                loose = checkers.module.test_instruction_following_loose(example, response)
    except _TooLongError:
        nothing = [False] * len(ids)
        return InstructionVerdict(strict=nothing, loose=nothing, approximate=False, timed_out=True)
    return InstructionVerdict(
        strict=strict.follow_instruction_list,
        loose=loose.follow_instruction_list,
        approximate=not checkers.trained and any(name in NEED_SENTENCES for name in ids),
    )


class _TooLongError(BaseException):
    """Not an Exception: the checkers catch those and go on."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLongError after so much processor time. Signals reach the main thread only; in
    another one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """Python's own random numbers, which the checkers use, from a seed; afterwards as before."""
    before = random.getstate()
    random.seed(key)
    try:
        yield
    finally:
        random.setstate(before)


def _given(arguments: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (arguments or {}).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Checkers:
    module: Any  # lm_eval.tasks.ifeval.utils
    trained: bool  # whether Punkt's data is there


@functools.cache
def _checkers() -> _Checkers:
    """The harness' checkers, deterministic and without a network.

    Only its IFEval directory is imported: the package ``lm_eval.tasks`` would bring the whole
    harness with metrics that are not installed here.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # it draws samples of the text; the verdict must not change
    with _bare_package("lm_eval.tasks"), _without_download(nltk):
        module = importlib.import_module("lm_eval.tasks.ifeval.utils")
        texts: Any = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
    texts._get_sentence_tokenizer.cache_clear()
    trained = _has_punkt(nltk)
    if not trained:
        _replace_sentences(texts, nltk)
    return _Checkers(module=module, trained=trained)


def _has_punkt(nltk: Any) -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def _replace_sentences(texts: Any, nltk: Any) -> None:
    """Give the harness' module a splitter that needs no data, for sentences and for words."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS)
    splitter = PunktSentenceTokenizer(parameters)

    def words(text: str) -> list[str]:
        return [
            word
            for sentence in splitter.tokenize(text)
            for word in nltk.tokenize.word_tokenize(sentence, preserve_line=True)
        ]

    texts._get_sentence_tokenizer = lambda: splitter
    texts.nltk = types.SimpleNamespace(
        tokenize=nltk.tokenize, data=nltk.data, word_tokenize=words, download=nltk.download
    )


@contextmanager
def _bare_package(name: str) -> Iterator[None]:
    """Make modules under a package importable without running the package's own ``__init__``."""
    if name in sys.modules:
        yield
        return
    parent, _, child = name.rpartition(".")
    package = types.ModuleType(name)
    package.__path__ = [
        str(Path(path) / child) for path in importlib.import_module(parent).__path__
    ]
    before = set(sys.modules)
    sys.modules[name] = package
    try:
        yield
    finally:  # whoever wants the package itself gets the real one
        for added in set(sys.modules) - before:
            if added == name or added.startswith(name + "."):
                del sys.modules[added]


@contextmanager
def _without_download(nltk: Any) -> Iterator[None]:
    download = nltk.download
    nltk.download = lambda *_args, **_options: False
    try:
        with redirect_stdout(io.StringIO()):  # it says "Downloaded" whatever came of it
            yield
    finally:
        nltk.download = download
