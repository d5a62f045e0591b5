"""HumanEval and MBPP as EvalPlus 0.3.1 grades them, inside our sandbox.

EvalPlus' problems, extraction, special oracles and tolerances; its own runner is not used: it
executes programs next to the expected values, with the user's rights, and wants every problem of
the set. Expected values are what the canonical solution returns (``code_expected``).
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.grading.code_expected import Expected, Problem
from evaluation.grading.code_run import LOST, FunctionCall, Verdict, run_calls
from evaluation.jail.packages import package_directories
from evaluation.jail.sandbox import Jail, Sandbox, unseen_modules
from evaluation.jail.values import decode, encode, hashed
from megatron_opdlm.errors import InputError, RunError

MINIMUM_SECONDS, TIMES_CANONICAL = 1.0, 4.0  # CPU time of a test
_SANITIZER = Path(__file__).with_name("code_sanitizer.py")
# Before it in a jail: EvalPlus' extraction imports its data sets, and with them `datasets`, which
# takes longer than most extractions, for functions that it does not call.
_WITHOUT_DATA = """
import sys, types
class Unused(types.ModuleType):
    def __getattr__(self, name): return None
sys.modules["evalplus.data"] = Unused("evalplus.data")
"""
# What extraction and oracles import, by the names of the modules.
_MODULES = (
    *("evalplus", "tree_sitter", "tree_sitter_python", "tqdm", "termcolor"),
    *("datasets", "tempdir", "wget", "appdirs"),
)
_ALL_TESTS_SECONDS, _SLACK_SECONDS = 60.0, 1.0  # EvalPlus': of CPU time here
_SANITIZE_SECONDS, _IMPORT_SECONDS = 30.0, 300.0
_TEXTS_PER_JAIL = 32  # at least: loading EvalPlus takes longer than the extraction


def lacks() -> str | None:
    """Which of EvalPlus' modules this environment lacks, or its programs do not see, with the
    remedy; None: they have them. Extraction runs in the sandbox.
    """
    absent = _absent(tuple(package_directories()))
    if absent:
        return (
            "its scorer is the package evalplus, not installed here with all it needs (without: "
            f"{', '.join(absent)}); run launch/setup.sh"
        )
    unseen = unseen_modules(_MODULES)
    if not unseen:
        return None
    return (
        f"programs in the sandbox do not see {', '.join(unseen)} (installed as links?); install "
        "copies of the packages (uv: --link-mode=copy), or run launch/setup.sh"
    )


@cache
def _absent(places: tuple[str, ...]) -> list[str]:
    return [name for name in _MODULES if PathFinder.find_spec(name, places) is None]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A program out of a response; ``problem``: why there is none although nobody looked to the
    end: ``sandbox_lost``, ``extraction_timeout`` or ``extraction_failed`` (its process died).
    """

    program: str = ""
    problem: str | None = None


def sanitize(sandbox: Sandbox, texts: list[tuple[str, str]]) -> list[Extraction]:
    """EvalPlus' extraction of ``(response, entry point)``; without a program where it fails.

    It parses untrusted text with C code and may take long, so it runs in jails, too.
    """
    size = max(-(-len(texts) // sandbox.workers), _TEXTS_PER_JAIL)
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [found for part in sandbox.map(lambda p: _sanitize(sandbox, p), parts) for found in part]


def _sanitize(sandbox: Sandbox, texts: list[tuple[str, str]]) -> list[Extraction]:
    done: list[Extraction] = []
    while len(done) < len(texts):  # a new jail after each text that breaks one
        left = texts[len(done) :]
        lost = [Extraction(problem=LOST.status)]
        done += sandbox.run(lambda jail, left=left: _sanitize_in(jail, left), lost)
    return done


def _sanitize_in(jail: Jail, texts: list[tuple[str, str]]) -> list[Extraction]:
    """Those up to and with the first that breaks the process."""
    jail.load(_WITHOUT_DATA + _SANITIZER.read_text(encoding="utf-8"))
    started = jail.start(cpu=_IMPORT_SECONDS)
    if not started.ok:
        raise RunError(
            f"EvalPlus cannot be loaded in the sandbox ({started.status} {started.detail}); run "
            "launch/setup.sh"
        )
    found: list[Extraction] = []
    for text, entry_point in texts:
        outcome = jail.call("sanitized", encode([text, entry_point]), cpu=_SANITIZE_SECONDS)
        if not outcome.ok:
            late = outcome.status in ("cpu_time", "wall_time")
            found.append(Extraction(problem=f"extraction_{'timeout' if late else 'failed'}"))
            if outcome.status != "exception":
                break
            continue
        value = decode(outcome.value)
        found.append(Extraction(program=value if isinstance(value, str) else ""))
    return found


# The problems.


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where EvalPlus keeps a set of problems."""

    dataset: str  # "humaneval" or "mbpp"
    stem: str  # of the file
    version: str
    variable: str  # of the environment, names another file

    @property
    def url(self) -> str:
        releases = f"https://github.com/evalplus/{self.stem.lower()}_release/releases"
        return f"{releases}/download/{self.version}/{self.stem}.jsonl.gz"

    @property
    def remedy(self) -> str:
        return f"put {self.url} into the data directory or name it in {self.variable}"


HUMANEVAL = Source(
    dataset="humaneval",
    stem="HumanEvalPlus",
    version="v0.1.10",
    variable="HUMANEVAL_OVERRIDE_PATH",
)
MBPP = Source(dataset="mbpp", stem="MbppPlus", version="v0.2.0", variable="MBPP_OVERRIDE_PATH")


def find_problems(source: Source, data_dir: Path) -> dict[str, Problem]:
    """EvalPlus' problems by id: from the file that its variable names, else from the data
    directory, else from its cache; empty where none is there. Nothing is downloaded.
    InputError: the file is damaged.
    """
    named = [Path(os.environ[source.variable])] if os.environ.get(source.variable) else []
    for place in (*named, *files_in(source, data_dir), cached(source)):
        if place.is_file():
            return _read(source, place)
    return {}


def files_in(source: Source, directory: Path) -> list[Path]:
    """Where a directory may hold the problems."""
    stems = (source.stem, f"{source.stem}-{source.version}")
    return [directory / f"{stem}{end}" for stem in stems for end in (".jsonl", ".jsonl.gz")]


def cached(source: Source) -> Path:
    """Where EvalPlus itself keeps them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "evalplus" / f"{source.stem}-{source.version}.jsonl"


def _read(source: Source, path: Path) -> dict[str, Problem]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        problems = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
        return {problem["task_id"]: prepared(source, problem) for problem in problems}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of EvalPlus ({error}); fetch it again") from error


def is_problem(row: Problem) -> bool:
    """Whether a row carries what EvalPlus' files do."""
    texts = ("prompt", "canonical_solution", "entry_point")
    return isinstance(row.get("base_input"), list) and all(
        isinstance(row.get(key), str) for key in texts
    )


def prepared(source: Source, problem: Problem) -> Problem:
    """A problem whose inputs have the types that JSON lost (MBPP's tuples and sets).

    Unchanged where EvalPlus is not installed: then nothing is graded (``lacks``).
    """
    if source.dataset != "mbpp" or _absent(tuple(package_directories())):
        return problem
    from evalplus.data.mbpp import mbpp_deserialize_inputs  # imports `datasets`: seconds

    task_id = str(problem["task_id"])
    inputs = {
        key: mbpp_deserialize_inputs(task_id, problem[key])
        for key in ("base_input", "plus_input")
        if isinstance(problem.get(key), list)
    }
    return {**problem, **inputs}


# The oracle.


def check(
    jail: Jail, source: Source, problem: Problem, program: str, inputs: list[Any], right: Expected
) -> Verdict:
    """A program against the inputs of one kind, by EvalPlus' rules: a limit a test, and one for
    all of them together, min(60 s, the sum of the tests') + 1 s.
    """
    limits = [max(MINIMUM_SECONDS, TIMES_CANONICAL * seconds) for seconds in right.seconds]
    oracle = Oracle(source.dataset, problem["entry_point"], problem.get("atol") or 0)
    wanted = zip(right.arguments, inputs, right.values, limits, strict=True)
    tests = [
        FunctionCall(arguments=text, is_right=oracle.of(list(given), value), cpu=limit)
        for text, given, value, limit in wanted
    ]
    total = min(_ALL_TESTS_SECONDS, sum(limits)) + _SLACK_SECONDS
    return run_calls(jail, program, problem["entry_point"], tests, cpu=total, total=total)


def _special_oracle() -> Any:
    """EvalPlus' module of problems that have more than one right value."""
    from evalplus.eval import _special_oracle

    return _special_oracle


class Oracle:
    """EvalPlus' comparison of a value with the expected one, with its exceptions for problems."""

    def __init__(self, dataset: str, entry_point: str, tolerance: float) -> None:
        self.dataset, self.entry_point = dataset, entry_point
        self.tolerance = tolerance  # grows to 1e-6 at the first expected float, and stays

    def of(self, arguments: list[Any], expected: Any) -> Callable[[Any], bool]:
        return lambda value: self.agrees(arguments, value, expected)

    def agrees(self, arguments: list[Any], value: Any, expected: Any) -> bool:
        """May raise for values that cannot be compared, which is a failure, too."""
        special = _special_oracle()
        if self.dataset == "humaneval" and self.entry_point == "find_zero":
            return abs(special._poly(*arguments, value)) <= self.tolerance
        equal = bool(value == expected)  # an array's truth value raises, as it does in EvalPlus
        if self.dataset == "mbpp":
            equal = self._mbpp(special, arguments, value, expected, equal)
        if self.tolerance == 0 and _is_floats(expected):
            self.tolerance = 1e-6
        if equal or self.tolerance == 0:
            return bool(equal)
        if type(value) is not type(expected):
            return False
        if isinstance(expected, (list, tuple)) and len(value) != len(expected):
            return False
        if np.shape(value) != np.shape(expected):  # [[]] would be close to [1.0]: nothing differs
            return False
        return bool(np.allclose(value, expected, rtol=1e-07, atol=self.tolerance))

    def _mbpp(
        self, special: Any, arguments: list[Any], value: Any, expected: Any, equal: bool
    ) -> bool:
        name = self.entry_point
        if name == "are_equivalent":  # Mbpp/164 has no agreed answer
            return True
        if name == "sum_div":  # Mbpp/295
            return equal or value == 0
        if name == "surface_Area":  # Mbpp/581: which height is meant?
            return equal or abs(value - special._surface_Area(*arguments)) <= self.tolerance
        if name == "digit_distance_nums":  # Mbpp/558
            return equal or value == special._digit_distance_nums(*arguments)
        if name in special.MBPP_OUTPUT_SET_EQ_TASKS:
            return set(hashed(value)) == set(expected)
        if name in special.MBPP_OUTPUT_NOT_NONE_TASKS:
            wanted = expected if isinstance(expected, bool) else expected is not None
            return value == wanted if isinstance(value, bool) else wanted == (value is not None)
        return equal


def _is_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float) or (
        isinstance(value, np.ndarray) and value.dtype in (np.float64, np.float32)
    )
