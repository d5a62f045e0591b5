"""Values as people write them, on command lines and in files: text -> what it stands for.

Every function raises ValueError with the rule that the text breaks.
"""

import math
import os

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOTHING = ("null", "none", "~", "")


def integer(text: str) -> int:
    """Decimal: ``010`` is ten, ``12:30`` is nothing."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be an integer") from None


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


def path(text: str) -> str:
    """A path, with ``~`` at its begin for the user's home: no directory is ever called that."""
    expanded = os.path.expanduser(plain_text(text))
    if expanded.startswith("~"):
        name = text.partition("/")[0]
        raise ValueError(f"begins with the home of {name[1:]}, who is no user here; write ./{name}")
    if "~" in expanded.split("/"):
        raise ValueError("names a directory ~, which stands for your home at the begin only")
    return expanded
