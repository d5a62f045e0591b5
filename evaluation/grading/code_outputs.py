"""When an output or a value is right."""

import math
from decimal import Decimal, InvalidOperation
from typing import Any

# numpy.allclose's defaults, which LiveCodeBench's tester compares numbers with.
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8


def same_words(output: str, expected: str) -> bool:
    """Equal after white space is normalised (Codeforces and the reference's stdin runner)."""
    return output.split() == expected.split()


def same_lines(output: str, expected: str) -> bool:
    """LiveCodeBench: equal stripped text, or its stripped lines without blank ones, or its numbers.

    Numbers may differ by rounding where one of the two is written with a point or an exponent;
    whole numbers must be equal. (The original lets whole numbers differ by 1 in 100,000, too.)
    """
    if output.strip() == expected.strip():
        return True
    lines, wanted = _lines(output), _lines(expected)
    if lines == wanted:
        return True
    return len(lines) == len(wanted) and all(map(_close_line, lines, wanted))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n") if line.strip()]


def _close_line(line: str, wanted: str) -> bool:
    words, expected = line.split(), wanted.split()
    return len(words) == len(expected) and all(map(_close, words, expected))


def _close(word: str, expected: str) -> bool:
    if word == expected:
        return True
    try:
        value, target = Decimal(word), Decimal(expected)
    except InvalidOperation:
        return False
    if not (value.is_finite() and target.is_finite()):
        return False
    if _is_whole(word) and _is_whole(expected):
        return value == target
    difference = abs(float(value) - float(target))
    return math.isfinite(difference) and difference <= _ABSOLUTE + _RELATIVE * abs(float(target))


def _is_whole(word: str) -> bool:
    return not set(word) & set(".eE")


def as_lists(value: Any) -> Any:
    """Tuples as lists, however deep: JSON's expected values know no tuples."""
    if isinstance(value, (list, tuple)):
        return [as_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return value


def same_value(value: Any, expected: Any) -> bool:
    """Equal up to tuples for lists. Anything that cannot be compared is not equal."""
    try:
        return bool(as_lists(value) == as_lists(expected))
    except Exception:  # e.g. an array's truth value
        return False
