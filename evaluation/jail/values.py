"""Values as text: how arguments and results cross the border of a jail.

Plain data only, as JSON with tags for what JSON lacks, so that reading never runs code: what a
program returns is data, whatever it calls itself. Anything else becomes an ``Opaque``, which equals
nothing. Standard library only: the file is used on both sides of the border.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 100
_MAX_RANGE = 10_000  # a longer range stays opaque: readers may want to list it, and many of them
_MAX_COLLISIONS = 32
_MAX_FRACTION_BITS = 1 << 16
_MAX_EXPONENT = 10_000  # of a decimal: larger ones are cheap to write and costly to compare
_PLAIN_INT_BITS = 1024
_LARGE = 1 << _PLAIN_INT_BITS

Export = Callable[[Any], dict[str, Any]]
Resolve = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value that is no plain data; equal to itself only."""

    type_name: str
    text: str


def encode(value: Any, export: Export | None = None) -> str:
    """The value as text. ``export`` makes the tag of what is no plain data (default: an Opaque).

    Values that nest too deeply are opaque as a whole.
    """
    try:
        return json.dumps(tagged(value, export or _opaque))
    except RecursionError:
        return json.dumps(_opaque(value))


def decode(text: str, resolve: Resolve | None = None) -> Any:
    """The value of a text. ``resolve`` reads tags that are not known here.

    ValueError: the text does not hold a value.
    """
    try:
        found = json.loads(text)
        return _value(found, resolve) if "{" in text else found  # every tag is an object
    except (TypeError, KeyError, RecursionError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"no value: {type(error).__name__}: {error}") from error


def _opaque(value: Any) -> dict[str, Any]:
    try:
        text = repr(value)[:200]
    except Exception as error:  # a program's own __repr__
        text = f"<repr raised {type(error).__name__}>"
    return {"t": "object", "type": type(value).__name__, "v": text}


def tagged(value: Any, export: Export, depth: int = 0) -> Any:
    """What ``encode`` writes as JSON. RecursionError: it nests too deeply."""
    if value is None or value is True or value is False:
        return value
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if number.bit_length() <= _PLAIN_INT_BITS else _tag("int", hex(number))
    if isinstance(value, float):
        return float.__float__(value)
    for kind in _SEQUENCES:
        if isinstance(value, kind):
            items = [
                item
                if (own := type(item)) in _AS_THEY_ARE or (own is int and -_LARGE < item < _LARGE)
                else tagged(item, export, depth + 1)
                for item in kind.__iter__(value)
            ]
            return items if kind is list else _tag(kind.__name__, items)
    if isinstance(value, dict):
        pairs = dict.items(value)
        both = [[tagged(k, export, depth + 1), tagged(v, export, depth + 1)] for k, v in pairs]
        return _tag("dict", both)
    return _scalar(value, export)


_AS_THEY_ARE = {str, float, bool, type(None)}  # no subclass of them, which might say anything
_SEQUENCES: tuple[Any, ...] = (list, tuple, set, frozenset, deque)


def _tag(name: str, content: Any) -> dict[str, Any]:
    return {"t": name, "v": content}


def _scalar(value: Any, export: Export) -> Any:
    if isinstance(value, complex):
        return _tag("complex", [value.real, value.imag])
    if isinstance(value, (bytes, bytearray)):
        return _tag(type(value).__name__, bytes(value).decode("latin-1"))
    if isinstance(value, range) and len(value) <= _MAX_RANGE:
        return _tag("range", [value.start, value.stop, value.step])
    if isinstance(value, Decimal):
        return _tag("Decimal", str(value))
    if isinstance(value, Fraction):
        return _tag("Fraction", [hex(value.numerator), hex(value.denominator)])
    if type(value).__module__ == "numpy":
        return _of_numpy(value, export)
    return export(value)


def _of_numpy(value: Any, export: Export) -> Any:
    if type(value).__name__ == "ndarray":
        return _tag("ndarray", tagged(value.tolist(), export, 1))
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return tagged(value.item(), export, 1)
    return export(value)


def _value(found: Any, resolve: Resolve | None) -> Any:
    if isinstance(found, list):
        return [_value(item, resolve) for item in found]
    if not isinstance(found, dict):
        return found
    kind, content = found["t"], found.get("v")
    if kind in _READERS:
        return _READERS[kind](content, resolve)
    if kind == "object":
        return Opaque(str(found["type"]), str(content))
    if resolve is None:
        raise KeyError(kind)
    return resolve(found)


def _items(content: Any, resolve: Resolve | None) -> list[Any]:
    return [_value(item, resolve) for item in list.copy(content)]


def hashed(items: Iterable[Any]) -> list[Any]:
    """Items that may be put into a set without taking time by the square of their number.

    ValueError: too many different ones have the same hash, which chance does not bring about and
    who knows Python's hash of numbers does.
    """
    listed = list(items)
    by_hash: dict[int, list[Any]] = {}
    for item in listed:
        same = by_hash.setdefault(hash(item), [])
        if item not in same:
            same.append(item)
            if len(same) > _MAX_COLLISIONS:
                raise ValueError(f"more than {_MAX_COLLISIONS} values of one hash")
    return listed


def _mapping(content: Any, resolve: Resolve | None) -> dict[Any, Any]:
    pairs = [(_value(key, resolve), _value(item, resolve)) for key, item in content]
    hashed(key for key, _ in pairs)
    return dict(pairs)


def _fraction(content: Any) -> Fraction:
    top, bottom = (int(text, 16) for text in content)
    if max(top.bit_length(), bottom.bit_length()) > _MAX_FRACTION_BITS:
        raise ValueError("a fraction too large to reduce")
    return Fraction(top, bottom)


def _decimal(content: Any) -> Decimal:
    number = Decimal(content)
    if number.is_finite() and abs(number.adjusted()) > _MAX_EXPONENT:
        raise ValueError("a decimal with an exponent too large to compare")
    return number


def _range(content: Any) -> range:
    found = range(*content)
    if len(found) > _MAX_RANGE:
        raise ValueError("a range too long to list")
    return found


def _check_array(content: Any) -> None:
    """ValueError for what no array holds: numpy would list it."""
    if isinstance(content, list):
        for item in content:
            _check_array(item)
    elif isinstance(content, dict) and content["t"] not in (
        "int",
        "complex",
        "Decimal",
        "Fraction",
    ):
        raise ValueError(f"a {content['t']} in an array")


def _array(content: Any, resolve: Resolve | None) -> Any:
    """A numpy array where numpy is there to compare with, else nested lists."""
    _check_array(content)
    items = _value(content, resolve)
    try:
        import numpy
    except ImportError:
        return items
    return numpy.array(items)


_READERS: dict[str, Callable[[Any, Resolve | None], Any]] = {
    "int": lambda content, _: int(content, 16),
    "tuple": lambda content, resolve: tuple(_items(content, resolve)),
    "set": lambda content, resolve: set(hashed(_items(content, resolve))),
    "frozenset": lambda content, resolve: frozenset(hashed(_items(content, resolve))),
    "deque": lambda content, resolve: deque(_items(content, resolve)),
    "dict": lambda content, resolve: _mapping(content, resolve),
    "complex": lambda content, _: complex(*content),
    "bytes": lambda content, _: content.encode("latin-1"),
    "bytearray": lambda content, _: bytearray(content.encode("latin-1")),
    "range": lambda content, _: _range(content),
    "Decimal": lambda content, _: _decimal(content),
    "Fraction": lambda content, _: _fraction(content),
    "ndarray": _array,
}
