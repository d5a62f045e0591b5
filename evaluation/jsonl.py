"""JSONL files of the evaluation: errors name the line, files are written whole or not at all."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_opdlm.data.json_text import parse, problem
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.file_kinds import foreign_kind
from megatron_opdlm.storage.output_paths import check_place


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


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: the final name never holds half a file."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_new_directory(out: Path, flag: str) -> None:
    """An output directory must be absent or empty: results are never mixed with others."""
    check_place(out, f"{flag} {out}")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise InputError(f"{flag} {out}: exists and is not empty; choose another name or remove it")


def check_new_file(out: Path, flag: str) -> None:
    """An output file must not exist yet; its directory is made when it is written."""
    check_place(out, f"{flag} {out}")
    if out.exists():
        raise InputError(f"{flag} {out}: exists already; choose another name or remove it")
