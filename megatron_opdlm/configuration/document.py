"""Every key of a configuration for people, from what stands at the keys: docs/configuration.md and
``train --help``.
"""

import dataclasses
import inspect
import json
from collections.abc import Iterator
from typing import Any

from megatron_opdlm import keys
from megatron_opdlm.keys import Key

_HEAD = """# Configuration

Made by `python -m megatron_opdlm.config > docs/configuration.md` from what stands at the keys.

A run is told what to do by `--config FILE.yaml` and `section.key=value` on the command line, which
wins over the file, which wins over the defaults here. Text is taken as it stands, a list or mapping
is written as YAML, and a value may refer to another key: `train.out=${model.path}-run`. On resume,
a key that "may change" may have another value when the same `train.out` goes on; the others must be
as they were. A file may also have `base` and `stages` ([recipes](recipes.md)).
"""
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def markdown(kind: type) -> str:
    """The whole of docs/configuration.md; ``kind``: the tree of sections."""
    parts = [_HEAD]
    for section in dataclasses.fields(kind):
        parts.append(f"\n## {section.name}\n\n{_about(section)}\n")
        parts.append("| key | default | unit | values | on resume | what it is |")
        parts.append("|---|---|---|---|---|---|")
        for name, knowledge, default, hint in _keys(section):
            may_change = section.metadata["may_change"] or knowledge.may_change
            cells = [
                f"`{section.name}.{name}`",
                f"`{_shown(default)}`" if default != "" else "empty",
                knowledge.unit,
                _values(hint, knowledge),
                "may change" if may_change else "",
                knowledge.help,
            ]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def help_text(kind: type) -> str:
    """The keys for ``--help``: a line or two each, with default, unit and range."""
    lines = ["keys, with their defaults:"]
    for section in dataclasses.fields(kind):
        for name, knowledge, default, hint in _keys(section):
            lines.append(f"  {section.name}.{name}={_shown(default)}")
            parts = [knowledge.unit, _values(hint, knowledge)]
            lines.append(f"      {knowledge.help} ({'; '.join(part for part in parts if part)})")
    return "\n".join(lines)


def _keys(section: Any) -> Iterator[tuple[str, Key, Any, Any]]:
    """Name, knowledge, default and type of a section's keys."""
    kind = section.default_factory
    defaults, hints = kind(), keys.types_of(kind)
    for name, knowledge in keys.keys_of(kind).items():
        yield name, knowledge, getattr(defaults, name), hints[name]


def _about(section: Any) -> str:
    return " ".join((inspect.getdoc(section.default_factory) or "").split()).replace("``", "`")


def _shown(value: Any) -> str:
    """A default as one writes it on a command line."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _values(hint: Any, knowledge: Key) -> str:
    """What a key may be."""
    allowed, plain = keys.choices(hint), keys.plain_type(hint)
    if plain is list:
        what = "list of " + (", ".join(allowed) if allowed else "text")
    elif plain is dict:
        what = f"mapping to numbers {knowledge.range}"
    elif allowed:
        what = ", ".join(allowed)
    else:
        what = "path" if knowledge.is_path else _NAMES[plain]
        what += f", {knowledge.range}" if knowledge.range else ""
    return what + (", or null" if keys.may_be_none(hint) else "")
