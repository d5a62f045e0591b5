"""Rows of a data file, each with the place that an error message names.

JSON (a list, or one object after the other), JSONL, Parquet, or a directory written by
``datasets.Dataset.save_to_disk``. A key whose value is null counts as absent, because Parquet fills
missing keys with nulls.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.data.json_text import parse, parse_at, problem
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.file_kinds import foreign_kind


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data file."""

    index: int  # from 0
    place: str  # "data.path=FILE: line 7", to begin an error message with
    fields: dict[str, Any]


def read_rows(path: Path, option: str) -> list[Row]:
    """All rows of ``path``. ``option`` is the key or flag that named the file, for the messages.

    A missing, empty, unreadable or malformed file is an ``InputError`` with path and line number.
    """
    where = f"{option}={path}"
    if not path.exists():
        raise InputError(f"{where}: no such file or directory; check the path")
    read = _reader(path, where)
    rows = [
        _row(index, f"{where}: {place}", value) for index, (place, value) in enumerate(read(path))
    ]
    if not rows:
        raise InputError(f"{where}: the file holds no rows; give it at least one")
    return rows


_Reader = Callable[[Path], Iterator[tuple[str, Any]]]


def _reader(path: Path, where: str) -> _Reader:
    if path.is_dir():
        return lambda path: _read_dataset(path, where)
    readers: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise InputError(
            f"{where}: unknown kind of file {path.suffix!r}; use .json, .jsonl, .parquet or a "
            "directory written by datasets"
        )
    return lambda path: readers[path.suffix](path, where)


def _row(index: int, place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{place}: a row must be a JSON object, not {json.dumps(value)[:40]}")
    fields = {key: item for key, item in value.items() if item is not None}
    return Row(index=index, place=place, fields=fields)


def _read_text(path: Path, where: str) -> str:
    kind = foreign_kind(path)
    if kind is not None:
        raise InputError(f"{where}: is {kind}")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}: line {line}: not UTF-8 text; save the file as UTF-8") from error


def _read_jsonl(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    # not splitlines(): JSON strings may hold U+2028, which it would cut at
    for number, line in enumerate(_read_text(path, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse(line)
        except ValueError as error:
            raise InputError(
                f"{where}: line {number}: not valid JSON ({problem(error)}); "
                "a .jsonl file has one object a line"
            ) from error


def _read_json(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """Items of a JSON list, or the objects that follow one another (one a line, or over as many
    lines as they take), each with the line it starts on.
    """
    text = _read_text(path, where)
    position = _skip_space(text, 0)
    in_list = text[position : position + 1] == "["
    position, line, counted = position + in_list, 1, 0
    try:
        while (position := _skip_space(text, position)) < len(text) and text[position] != "]":
            line += text.count("\n", counted, position)
            counted = position
            value, position = parse_at(text, position)
            yield f"line {line}", value
            position = _skip_space(text, position)
            if in_list and text[position : position + 1] == ",":
                position += 1
            elif in_list and text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if text[position:].strip() != "]" * in_list:
            raise json.JSONDecodeError("Expecting the list's end", text, position)
    except ValueError as error:
        line = getattr(error, "lineno", line)
        raise InputError(
            f"{where}: line {line}: not valid JSON ({problem(error)}); "
            "a .json file is one list of objects, or one object after the other"
        ) from error


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_parquet(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{where}: not a readable Parquet file: {error}") from error
    columns = [_values(table, i, where) for i in range(table.num_columns)]
    for number in range(table.num_rows):
        row = {
            name: column[number] for name, column in zip(table.column_names, columns, strict=True)
        }
        yield f"row {number + 1}", row


def _values(table: Any, index: int, where: str) -> list[Any]:
    """A column of an Arrow table as Python's own values; InputError where there are none of them,
    such as a date after the year 9999.
    """
    try:
        return table.column(index).to_pylist()
    except (ArithmeticError, ValueError) as error:
        raise InputError(
            f"{where}: column {table.column_names[index]} cannot be read: {error}; leave it out"
        ) from error


def _read_dataset(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    import datasets
    import pyarrow

    try:
        dataset = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{where}: not a directory written by datasets: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(map(str, dataset))
        raise InputError(f"{where}: holds the splits {splits}; give the directory of one of them")
    try:
        for number, value in enumerate(dataset, start=1):
            yield f"row {number}", value
    except (ArithmeticError, ImportError, OSError, ValueError) as error:  # as it decodes columns
        raise InputError(f"{where}: a column cannot be read: {error}; remove it") from error
