"""The tests of the training mixture's code rows (``tests_json``).

Four shapes, each as JSON text or parsed: ``{"type": "pytest", "test_code", "fn_name"}``; ``{"type":
"stdio", "cases": [{"input", "output"}]}``; ``{"type": "fn_call", "fn_name", "cases": [{"args":
[...], "expected": [...]}]}``; a list of assert statements (as a Python literal, too).
"""

import ast
import json
from typing import Any

from evaluation.grading.code_outputs import same_value, same_words
from evaluation.grading.code_run import (
    FunctionCall,
    InputOutput,
    Verdict,
    run_calls,
    run_stdio,
    run_tests,
)
from evaluation.grading.code_text import called_function, fenced_python
from evaluation.jail.sandbox import Jail
from evaluation.jail.values import encode

ALL_TESTS_SECONDS, ONE_CASE_SECONDS = 20.0, 5.0  # of CPU time

Tests = dict[str, Any] | list[str]


def read_tests(value: Any) -> Tests | None:
    """The tests of a row; None: they have none of the four shapes (the row cannot be scored)."""
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, list):
        return value if value and all(isinstance(item, str) for item in value) else None
    if not isinstance(value, dict):
        return None
    return value if _is_scorable(value) else None


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _is_scorable(tests: dict[str, Any]) -> bool:
    kind, cases = tests.get("type"), tests.get("cases")
    if kind == "pytest":
        return isinstance(tests.get("test_code"), str) and bool(tests["test_code"].strip())
    if not isinstance(cases, list) or not cases or not all(isinstance(c, dict) for c in cases):
        return False
    if kind == "stdio":
        return all(isinstance(case.get(key), str) for case in cases for key in ("input", "output"))
    named = isinstance(tests.get("fn_name"), str) and bool(tests["fn_name"])
    listed = all(isinstance(case.get("args"), list) and "expected" in case for case in cases)
    return kind == "fn_call" and named and listed


def function_of(row: dict[str, Any], tests: Tests) -> str | None:
    """The function that is tested, as far as row or tests say."""
    inside = tests.get("fn_name") if isinstance(tests, dict) else None
    for name in (row.get("fn_name"), inside, row.get("entry_point")):
        if isinstance(name, str) and name:
            return name
    return called_function(tests) if isinstance(tests, list) else None


def program_of(row: dict[str, Any], response: str) -> str:
    """The response's program; empty where there is none."""
    tests = read_tests(row.get("tests_json"))
    return fenced_python(response, function_of(row, tests) if tests else None)


def check(jail: Jail, row: dict[str, Any], program: str) -> Verdict:
    """Run a program against its row's tests, which must have one of the shapes."""
    tests = read_tests(row["tests_json"])
    assert tests is not None, "rows without readable tests are not graded"
    function = function_of(row, tests)
    functions = [function] if function else []
    if isinstance(tests, list):
        return run_tests(
            jail, program, setup=[], functions=functions, snippets=tests, cpu=ALL_TESTS_SECONDS
        )
    if tests["type"] == "pytest":
        return run_tests(
            jail,
            program,
            setup=[tests["test_code"]],
            functions=functions,
            snippets=[],
            collect=True,
            cpu=ALL_TESTS_SECONDS,
        )
    if tests["type"] == "stdio":
        cases = [InputOutput(given=c["input"], expected=c["output"]) for c in tests["cases"]]
        return run_stdio(jail, program, cases, cpu=ONE_CASE_SECONDS, same=same_words)
    calls = [_call(case) for case in tests["cases"]]
    within = "Solution"
    return run_calls(jail, program, str(function), calls, cpu=ALL_TESTS_SECONDS, within=within)


def _call(case: dict[str, Any]) -> FunctionCall:
    expected = case["expected"]

    def is_right(value: Any) -> bool:
        if (
            isinstance(expected, list)
            and len(expected) == 1
            and not isinstance(value, (list, tuple))
        ):
            return same_value(value, expected[0])
        return same_value(value, expected) or (
            isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])
        )

    return FunctionCall(arguments=encode(case["args"]), is_right=is_right, cpu=ALL_TESTS_SECONDS)
