"""Values as people write them, on command lines and in files: text -> what it stands for.

Every function raises ValueError with the rule that the text breaks.
"""

import math
import os

_LARGEST = 2**31 - 1
_NAME, _PATH = 230, 4000  # bytes that leave room for the names that we add
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOTHING = ("null", "none", "~", "")


def integer(text: str) -> int:
    """Decimal and within 32 bits: ``010`` is ten, ``12:30`` is nothing."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError("must be an integer") from None
    if abs(value) > _LARGEST:
        raise ValueError(f"must be an integer of at most {_LARGEST:,}")
    return value


def number(text: str) -> float:
    """Decimal, with or without an exponent."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def truth(text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise ValueError("must be true or false")
    return _TRUTH[text.lower()]


def is_nothing(text: str) -> bool:
    """Whether a key that may be ``null`` is."""
    return text.lower() in _NOTHING


def plain_text(text: str) -> str:
    """As it stands, if a file and a file's name can hold it."""
    if "\0" in text:
        raise ValueError("holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8; rename it") from None
    return text


def one_line(text: str) -> str:
    """Text for a line of a table or a log, or a name on one."""
    if "\n" in text or "\r" in text:
        raise ValueError("holds a line break; remove it")
    return plain_text(text)


def named_path(text: str) -> tuple[str, str]:
    """``[NAME=]PATH`` -> name and path; the name is empty where none is given. What is there as it
    stands is a path, whatever it holds.
    """
    name, equals, rest = text.partition("=")
    if not equals or os.path.lexists(path(text)):
        return "", path(text)
    return one_line(name), path(rest)


def path(text: str) -> str:
    """A path, with ``~`` at its begin for the user's home: no directory is ever called that."""
    expanded = os.path.expanduser(one_line(text))
    if expanded.startswith("~"):
        name = text.partition("/")[0]
        raise ValueError(f"begins with the home of {name[1:]}, who is no user here; write ./{name}")
    parts = expanded.split("/")
    if "~" in parts:
        raise ValueError("names a directory ~, which stands for your home at the begin only")
    if max(len(part.encode()) for part in parts) > _NAME or len(expanded.encode()) > _PATH:
        raise ValueError(f"is too long for a file system; use names of at most {_NAME} bytes")
    return expanded
