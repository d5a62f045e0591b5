"""What a setting says of itself, at the field that holds it: what it is, its unit, its range, and
whether it may change when a run goes on.

Sections of the configuration, decoding settings and command lines are dataclasses whose fields are
made by ``key``. Checks, ``--help`` and docs/configuration.md read what stands there.
"""

import copy
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from megatron_opdlm import written_values
from megatron_opdlm.errors import InputError, nearest

_LONGEST = 80  # characters of a value that a message repeats


@dataclass(frozen=True, kw_only=True)
class Key:
    """Of a list or a mapping, the range is that of every value in it."""

    help: str
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_else: tuple[int, str] | None = None  # a value outside the range, and what it stands for
    is_path: bool = False  # of a file or directory: ~ is the user's home
    may_change: bool = False  # between two starts of one run

    @property
    def range(self) -> str:
        """In words; empty where every value of the type is allowed."""
        if self.at_most is not None or self.below is not None:
            low = f"({self.above:g}" if self.above is not None else f"[{self.at_least:g}"
            high = f"{self.below:g})" if self.below is not None else f"{self.at_most:g}]"
            return f"in {low}, {high}"
        if self.above is not None:
            return f"greater than {self.above:g}"
        if self.at_least is None:
            return ""
        least = f"at least {self.at_least:g}"
        return least + (f", or {self.or_else[0]} for {self.or_else[1]}" if self.or_else else "")

    def allows(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return (self.or_else is not None and value == self.or_else[0]) or (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def key(default: Any, help: str, **knowledge: Any) -> Any:
    """A dataclass field: its default and what a ``Key`` knows of it."""
    return _field(default, Key(help=help, **knowledge))


def key_of(owner: type, name: str, default: Any, **changes: Any) -> Any:
    """The field ``name`` of another dataclass with another default: the same knowledge."""
    return _field(default, dataclasses.replace(keys_of(owner)[name], **changes))


def section(kind: type, *, may_change: bool = False) -> Any:
    """A field that holds a dataclass of keys. ``may_change``: all of them."""
    return field(default_factory=kind, metadata={"may_change": may_change})


def _field(default: Any, knowledge: Key) -> Any:
    metadata = {"key": knowledge}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def keys_of(owner: type) -> Mapping[str, Key]:
    """What the fields of a dataclass say of themselves, by name, in their order."""
    return {item.name: item.metadata["key"] for item in dataclasses.fields(owner)}


@cache
def types_of(owner: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields, by name."""
    return typing.get_type_hints(owner)


def read(owner: type, name: str, value: Any, shown: str) -> Any:
    """``value``, text or what YAML made of it, as the field ``name`` holds it. InputError where it
    has another type, is no choice or lies outside the range. ``shown``: what users call it.
    """
    found = _typed(shown, value, types_of(owner)[name], keys_of(owner)[name])
    check(owner, name, found, shown)
    return found


def _typed(shown: str, value: Any, hint: Any, knowledge: Key) -> Any:
    arguments, plain = typing.get_args(hint), plain_type(hint)
    if "true" in choices(hint) and str(value).lower() in ("true", "false"):  # among other choices
        return str(value).lower()
    if may_be_none(hint):
        nothing = value is None or (isinstance(value, str) and written_values.is_nothing(value))
        return None if nothing else _typed(shown, value, arguments[0], knowledge)
    if plain is list and isinstance(value, list):
        return [_typed(f"{shown}[{i}]", v, arguments[0], knowledge) for i, v in enumerate(value)]
    if plain is dict and isinstance(value, dict):
        return {
            _typed(f"a name in {shown}", inner, str, knowledge): _typed(
                f"{shown}.{inner}", item, arguments[1], knowledge
            )
            for inner, item in value.items()
        }
    if plain is str and value is None:  # `path:` in a file
        return ""
    if isinstance(value, str) and plain in _READERS:
        reader = written_values.path if knowledge.is_path else _READERS[plain]
        try:
            return reader(value)
        except ValueError as error:
            raise InputError(f"{_given(shown, value)} {error}") from error
    if plain is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is plain and plain in _READERS:
        return value
    raise InputError(f"{_given(shown, value)} must be {_TYPE_NAMES[plain]}")


_READERS: Mapping[type, Callable[[str], Any]] = {
    bool: written_values.truth,
    int: written_values.integer,
    float: written_values.number,
    str: written_values.plain_text,
}
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    list: "a list, such as [a, b]",
    dict: "a mapping, such as {name: 1}",
}


def _given(shown: str, value: Any) -> str:
    """A value as users wrote it."""
    text = str(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return f"{shown} {text}" if shown.startswith("--") else f"{shown}={text}"


def check(owner: type, name: str, value: Any, shown: str) -> None:
    """InputError where ``value`` is no choice of the field, or outside its range."""
    hint, knowledge = types_of(owner)[name], keys_of(owner)[name]
    allowed = choices(hint)
    if isinstance(value, list):
        items = [(f"{shown}[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, dict):
        items = [(f"{shown}.{inner}", item) for inner, item in value.items()]
    else:
        items = [(shown, value)]
    for place, item in items:
        if item is not None:
            _check(place, item, allowed, knowledge)


def _check(shown: str, value: Any, allowed: tuple[str, ...], knowledge: Key) -> None:
    if allowed and value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise InputError(f"{_given(shown, value)} must be one of {', '.join(allowed)}{hint}")
    if isinstance(value, bool | str):
        return
    if not math.isfinite(value):
        raise InputError(f"{_given(shown, value)} must be a finite number")
    if not knowledge.allows(value):
        verb = "lie" if knowledge.range.startswith("in ") else "be"
        raise InputError(f"{_given(shown, value)} must {verb} {knowledge.range}")


def described(owner: type, name: str) -> str:
    """What a field is, with its unit, range and default, for ``--help``."""
    knowledge, default = keys_of(owner)[name], getattr(owner(), name)
    parts = [knowledge.unit, knowledge.range, "" if default is None else f"default {default}"]
    return f"{knowledge.help} ({'; '.join(part for part in parts if part)})"


def choices(hint: Any) -> tuple[str, ...]:
    """What a field of this type, or each of its items, may be; empty: anything."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((found for inner in typing.get_args(hint) if (found := choices(inner))), ())


def may_be_none(hint: Any) -> bool:
    """Whether ``null`` is a value of this type."""
    return types.NoneType in typing.get_args(hint)


def plain_type(hint: Any) -> type:
    """bool, int, float, str, list or dict: what a value of this type is; ``None`` left out."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        return plain_type(typing.get_args(hint)[0])
    return str if origin is Literal else origin or hint
