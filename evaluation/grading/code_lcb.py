"""LiveCodeBench's tests and how its tester runs programs, inside our sandbox."""

import base64
import binascii
import io
import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

from evaluation.grading.code_outputs import same_lines, same_value
from evaluation.grading.code_run import FunctionCall, InputOutput, Verdict, run_calls, run_stdio
from evaluation.jail.sandbox import Jail
from evaluation.jail.values import encode

TEST_SECONDS = 6.0  # of CPU time, each test; also to run a program's definitions
_MAX_UNPACKED = 1 << 30  # bytes of one problem's private tests

_STAR_IMPORTS = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins"),
    "typing",
)
# What the tester puts before every program: solutions may leave these imports out.
PREAMBLE = "".join(
    [
        *(f"from {name} import *\n" for name in _STAR_IMPORTS),
        *(f"import {name}\n" for name in _STAR_IMPORTS if name not in ("builtins", "typing")),
        "sys.setrecursionlimit(50000)\n",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Tests:
    """Inputs and outputs as texts; ``function``: called with a JSON value a line, else stdin."""

    inputs: list[str]
    outputs: list[str]
    function: str | None


class _TextOnly(pickle.Unpickler):
    """Unpickles plain values; anything that names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} has no place among tests")


def read_private_tests(packed: str) -> list[dict[str, Any]]:
    """JSON, or base64 of zlib of a pickled JSON text. ValueError: neither, or not plain text."""
    try:
        return json.loads(packed)
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(packed, validate=True), _MAX_UNPACKED)
        if unpacker.unconsumed_tail:
            raise ValueError("private tests unpack to more than 1 GiB")
        text = _TextOnly(io.BytesIO(data)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError) as error:
        raise ValueError(f"private tests are neither JSON nor its packed form: {error}") from error
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"private tests hold a {type(text).__name__}, not JSON text")
    return json.loads(text)


def tests_of(row: dict[str, Any]) -> Tests:
    """A row's tests: prepared (``input_output``) or as LiveCodeBench publishes them (public, then
    private). ValueError: what is wrong with them, calls' arguments and values included.
    """
    if "input_output" in row:
        raw = row["input_output"]
        data = json.loads(raw) if isinstance(raw, str) else raw
        inputs, outputs, function = data["inputs"], data["outputs"], data.get("fn_name")
    else:
        cases = [
            *json.loads(row["public_test_cases"]),
            *read_private_tests(row["private_test_cases"]),
        ]
        inputs = [case["input"] for case in cases]
        outputs = [case["output"] for case in cases]
        metadata = row.get("metadata") or "{}"
        function = (json.loads(metadata) if isinstance(metadata, str) else metadata).get(
            "func_name"
        )
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs; one each is needed")
    if not all(isinstance(text, str) for text in (*inputs, *outputs)):
        raise ValueError("inputs and outputs must be texts")
    tests = Tests(inputs=inputs, outputs=outputs, function=function or None)
    if tests.function is not None:
        _check_calls(tests)
    return tests


def _check_calls(tests: Tests) -> None:
    for number, pair in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
        try:
            _call(*pair)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"test {number} of the function {tests.function} is no JSON value a line: {error}"
            ) from error


def check(jail: Jail, tests: Tests, program: str) -> Verdict:
    """A program against all tests, up to the first that fails."""
    source = PREAMBLE + program
    if tests.function is None:
        pairs = zip(tests.inputs, tests.outputs, strict=True)
        cases = [InputOutput(given=given, expected=expected) for given, expected in pairs]
        return run_stdio(jail, source, cases, cpu=TEST_SECONDS, same=same_lines)
    calls = [_call(*pair) for pair in zip(tests.inputs, tests.outputs, strict=True)]
    within = "Solution"
    return run_calls(jail, source, tests.function, calls, cpu=TEST_SECONDS, within=within)


def _call(given: str, expected: str) -> FunctionCall:
    target = json.loads(expected)
    return FunctionCall(
        arguments=encode([json.loads(line) for line in given.split("\n") if line.strip()]),
        is_right=lambda value: same_value(value, target),
        cpu=TEST_SECONDS,
    )
