"""Codeforces.json out of open-r1/codeforces: the problems that a stdin/stdout judge can grade.

Any text of a row may be null there: no statement, an example without output, a test without input.
It counts as empty; a problem that says nothing at all is left out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

_PYTHON_FACTOR, _SLACK_SECONDS = 3, 1  # the sites' limits are made for C++


def codeforces_rows() -> list[dict[str, Any]]:
    """The rows of the file, from the Hub (the test split of the configuration ``verifiable``)."""
    from datasets import load_dataset

    return prepare(load_dataset("open-r1/codeforces", "verifiable", split="test"))


def prepare(problems: Iterable[Any]) -> list[dict[str, Any]]:
    """The gradable problems in the file's schema: 377 of the published 422."""
    rows = [_row(problem) for problem in problems if _is_gradable(problem)]
    return [row for row in rows if row["question"]]


def _is_gradable(problem: Mapping[str, Any]) -> bool:
    """Standard streams, no interaction, one right output, official tests."""
    return (
        problem.get("input_mode") == "stdio"
        and bool(problem.get("executable"))
        and not problem.get("interaction_format")
        and not problem.get("generated_checker")
        and bool(problem.get("official_tests"))
    )


def _row(problem: Mapping[str, Any]) -> dict[str, Any]:
    seconds = float(problem.get("time_limit") or 1.0)
    return {
        "task_id": problem["id"],
        "question": question(problem),
        "test_input": [_unix_lines(test.get("input")) for test in problem["official_tests"]],
        "test_output": [_unix_lines(test.get("output")) for test in problem["official_tests"]],
        "test_time_limit": max(1, math.ceil(seconds * _PYTHON_FACTOR) + _SLACK_SECONDS),
        "test_method": "stdio",
        "rating": problem.get("rating"),
        "tags": list(problem.get("tags") or []),
        "platform": "codeforces",
    }


def question(problem: Mapping[str, Any]) -> str:
    """Title, statement and the sections that the problem has, as on its page; a blank line before
    each. Formulas between triple dollars get single ones.
    """
    parts = [(problem.get("title") or "").strip(), _dollars(problem.get("description"))]
    for heading, key in (("Input", "input_format"), ("Output", "output_format")):
        if problem.get(key):
            parts.append(f"{heading}\n{_dollars(problem[key])}")
    examples = [
        [(example.get(key) or "").rstrip() for key in ("input", "output")]
        for example in problem.get("examples") or []
        if example
    ]
    examples = [example for example in examples if any(example)]
    if examples:
        parts.append("Examples")
    for given, expected in examples:
        parts.append(f"Input\n{given}\nOutput\n{expected}")
    if problem.get("note"):
        parts.append(f"Note\n{_dollars(problem['note'])}")
    return "\n\n".join(part for part in parts if part).strip()


def _dollars(text: str | None) -> str:
    return (text or "").strip().replace("$$$", "$")


def _unix_lines(text: str | None) -> str:
    return (text or "").replace("\r\n", "\n").replace("\r", "\n")
