"""HumanEval and MBPP as EvalPlus 0.3.1 grades them, inside our sandbox.

EvalPlus' problems, extraction, special oracles and tolerances; its own runner is not used: it
executes programs next to the expected values, with the user's rights, and wants every problem of
the set. Expected values are what the canonical solution returns, computed once a problem in a jail.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.grading.code_run import FunctionCall, Verdict, failed, run_calls
from evaluation.jail.values import decode, encode
from evaluation.sandbox import Jail, Sandbox
from megatron_opdlm.errors import InputError

MINIMUM_SECONDS, TIMES_CANONICAL = 1.0, 4.0  # CPU time of a test
_SANITIZER = Path(__file__).with_name("code_sanitizer.py")
_ALL_TESTS_SECONDS = 60.0
_SANITIZE_SECONDS, _IMPORT_SECONDS = 30.0, 300.0
_CANONICAL_SECONDS = 60.0
_TEXTS_PER_JAIL = 32  # at least: loading EvalPlus takes longer than the extraction

Problem = dict[str, Any]


def sanitize(sandbox: Sandbox, texts: list[tuple[str, str]]) -> list[str]:
    """EvalPlus' extraction of ``(response, entry point)``; empty where it fails.

    It parses untrusted text with C code and may take long, so it runs in jails, too.
    """
    size = max(-(-len(texts) // sandbox.workers), _TEXTS_PER_JAIL)
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [
        program for part in sandbox.map(lambda p: _sanitize(sandbox, p), parts) for program in part
    ]


def _sanitize(sandbox: Sandbox, texts: list[tuple[str, str]]) -> list[str]:
    done: list[str] = []
    while len(done) < len(texts):  # a new jail after each text that breaks one
        left = texts[len(done) :]
        done += sandbox.run(lambda jail, left=left: _sanitize_in(jail, left), [""])
    return done


def _sanitize_in(jail: Jail, texts: list[tuple[str, str]]) -> list[str]:
    """Those up to and with the first that breaks the process."""
    jail.load(_SANITIZER.read_text(encoding="utf-8"))
    started = jail.start(cpu=_IMPORT_SECONDS)
    if not started.ok:
        raise InputError(
            f"EvalPlus cannot be loaded ({started.status} {started.detail}); install it with "
            "pip install 'megatron-opdlm[evaluation]'"
        )
    programs: list[str] = []
    for text, entry_point in texts:
        outcome = jail.call("sanitized", encode([text, entry_point]), cpu=_SANITIZE_SECONDS)
        value = decode(outcome.value) if outcome.ok else ""
        programs.append(value if isinstance(value, str) else "")
        if not outcome.ok and outcome.status != "exception":
            break
    return programs


# The problems.


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where EvalPlus keeps a set of problems."""

    dataset: str  # "humaneval" or "mbpp"
    stem: str  # of the file
    version: str
    variable: str  # of the environment, names another file

    @property
    def remedy(self) -> str:
        url = f"https://github.com/evalplus/{self.stem.lower()}_release/releases"
        return (
            f"put {self.stem}.jsonl.gz ({self.version}, {url}) into the data directory or name it "
            f"in {self.variable}"
        )


HUMANEVAL = Source(
    dataset="humaneval",
    stem="HumanEvalPlus",
    version="v0.1.10",
    variable="HUMANEVAL_OVERRIDE_PATH",
)
MBPP = Source(dataset="mbpp", stem="MbppPlus", version="v0.2.0", variable="MBPP_OVERRIDE_PATH")


def find_problems(source: Source, data_dir: Path) -> dict[str, Problem]:
    """EvalPlus' problems by id, from the data directory, the file that its variable names, or its
    cache; empty where none is there. Nothing is downloaded. InputError: the file is damaged.
    """
    stems = (source.stem, f"{source.stem}-{source.version}")
    places = [data_dir / f"{stem}{end}" for stem in stems for end in (".jsonl", ".jsonl.gz")]
    if os.environ.get(source.variable):
        places.insert(0, Path(os.environ[source.variable]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places.append(cache / "evalplus" / f"{stems[1]}.jsonl")
    for place in places:
        if place.is_file():
            return _read(source, place)
    return {}


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
    """A problem whose inputs have the types that JSON lost (MBPP's tuples and sets)."""
    if source.dataset != "mbpp":
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


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the canonical solution makes of the inputs of one kind."""

    values: list[Any]
    seconds: list[float]  # CPU time of each


def expected_of(jail: Jail, problem: Problem, inputs: list[Any]) -> Expected:
    """Run the canonical solution. InputError: it fails, so the problem cannot be graded."""
    jail.load(problem["prompt"] + problem["canonical_solution"])
    outcome = jail.start(cpu=_CANONICAL_SECONDS)
    values, seconds = [], []
    for given in inputs:
        if outcome.ok:
            arguments = encode(list(given))
            outcome = jail.call(problem["entry_point"], arguments, cpu=_CANONICAL_SECONDS)
            values.append(decode(outcome.value) if outcome.ok else None)
            seconds.append(outcome.cpu_seconds)
    if not outcome.ok:
        raise InputError(
            f"problem {problem['task_id']}: its canonical solution fails "
            f"({failed(outcome).detail}); fetch the file again"
        )
    return Expected(values=values, seconds=seconds)


def check(
    jail: Jail, source: Source, problem: Problem, program: str, inputs: list[Any], right: Expected
) -> Verdict:
    """A program against the inputs of one kind, by EvalPlus' rules."""
    limits = [max(MINIMUM_SECONDS, TIMES_CANONICAL * seconds) for seconds in right.seconds]
    oracle = Oracle(source.dataset, problem["entry_point"], problem.get("atol") or 0)
    tests = [
        FunctionCall(arguments=list(given), is_right=oracle.of(list(given), value), cpu=limit)
        for given, value, limit in zip(inputs, right.values, limits, strict=True)
    ]
    definitions = min(_ALL_TESTS_SECONDS, sum(limits) + MINIMUM_SECONDS)
    return run_calls(jail, program, problem["entry_point"], tests, cpu=definitions)


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
            return set(value) == set(expected)
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
