"""The tree of sections and keys: from plain values to typed ones and back to dotted keys."""

import dataclasses
from difflib import SequenceMatcher
from typing import Any, TypeVar

from megatron_opdlm import keys
from megatron_opdlm.errors import InputError

Tree = TypeVar("Tree")


def flatten(config: Any) -> dict[str, Any]:
    """``{"model.path": "...", ...}``: every leaf by its dotted key, in the order of the tree."""
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }


def build(kind: type[Tree], tree: dict[Any, Any]) -> Tree:
    """Plain tree -> typed tree of ``kind``, a dataclass of sections that are dataclasses: every
    section and key exists, every value has its type and lies in its range; else InputError.
    """
    sections, built = keys.types_of(kind), {}
    for name, values in tree.items():
        if name not in sections:
            first_key = next(iter(values), "") if isinstance(values, dict) else ""
            raise unknown_key(kind, f"{name}.{first_key}" if first_key else str(name))
        if values is None:  # `model:` with every line under it commented out
            continue
        if not isinstance(values, dict):
            raise InputError(f"{name}={values} is a section; write {name}.KEY=value")
        for key in values:
            if key not in keys.types_of(sections[name]):
                raise unknown_key(kind, f"{name}.{key}")
        built[name] = build_section(sections[name], values, f"{name}.")
    return kind(**built)


def build_section(kind: type[Tree], values: dict[Any, Any], before: str = "") -> Tree:
    """Plain values -> the dataclass that holds them; ``before`` a key's name in messages."""
    return kind(
        **{name: keys.read(kind, name, value, f"{before}{name}") for name, value in values.items()}
    )


def unknown_key(kind: type, key: str) -> InputError:
    """Names the nearest valid key: first among those of the same name in another section."""
    valid = list(flatten(kind()))
    same_name = [known for known in valid if known.partition(".")[2] == key.rpartition(".")[2]]
    closest = max(same_name or valid, key=lambda known: SequenceMatcher(None, key, known).ratio())
    return InputError(f"configuration key {key!r} does not exist (did you mean {closest!r}?)")
