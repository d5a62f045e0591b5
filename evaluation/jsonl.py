"""Rows of the evaluation's files; errors name the line."""

import json
from pathlib import Path
from typing import Any

from megatron_opdlm.data.json_text import parse, problem
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.file_kinds import foreign_kind


def read_jsonl(path: Path, what: str) -> list[dict[str, Any]]:
    """Every row of a JSONL file; blank lines are skipped.

    InputError names ``what`` (a flag or a role), file and line.
    """
    if not path.is_file():
        raise InputError(f"{what} {path}: no such file; give a JSONL file, one object a line")
    _refuse_other_kinds(path, what)
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, f"{what} {path}: line {number}"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} {path}: not UTF-8 text ({error.reason}); give a JSONL file"
        ) from error
    if not rows:
        raise InputError(f"{what} {path}: holds no rows; give at least one object a line")
    return rows


def read_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """Every row of a data file: a JSON list of objects (``.json``), else JSONL.

    InputError names ``what`` (a flag or a role), file and row.
    """
    if path.suffix != ".json":
        return read_jsonl(path, what)
    _refuse_other_kinds(path, what)
    try:
        rows = parse(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        line = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{what} {path}: not JSON ({problem(error)}{line}); give a list of objects"
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"{what} {path}: a {type(rows).__name__}; give a list of objects")
    if not rows:
        raise InputError(f"{what} {path}: holds no rows; give at least one object")
    wrong = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise InputError(
            f"{what} {path}: row {wrong}: a {type(rows[wrong]).__name__}, an object is needed; "
            "write {...}"
        )
    return rows


def _refuse_other_kinds(path: Path, what: str) -> None:
    kind = foreign_kind(path)
    if kind is not None:
        raise InputError(f"{what} {path}: is {kind}")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse(line)
    except ValueError as error:
        raise InputError(
            f"{where}: not JSON ({problem(error)}); write one object a line"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, an object is needed; write {{...}}")
    return row
