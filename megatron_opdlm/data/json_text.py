"""JSON of users: whatever is wrong with it is a ``ValueError`` of one line.

The standard parser raises RecursionError for deep nesting, takes the last of two equal keys in
silence, and reads escapes that are half of a character, which no tokenizer and no file takes.
"""

import json
import re
from typing import Any

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a character; two of them are one


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse(text: str) -> Any:
    """The value of a JSON text with nothing else in it. ValueError: see ``problem``."""
    value, end = parse_at(text, _skip_space(text, 0))
    if (rest := _skip_space(text, end)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)
    return value


def parse_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at ``start``, and where it ends. ValueError: see ``problem``."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    if _HALF.search(text, start, end):
        _refuse_halves(value)
    return value, end


def problem(error: ValueError) -> str:
    """What is wrong with the text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error).partition(";")[0]


def _refuse_halves(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"the escape \\u{ord(half):04x} is half of a character") from None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
