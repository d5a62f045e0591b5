"""Values of a configuration: read from YAML files and overrides, held to the types of their keys.

Every problem is an ``InputError`` of one line. Imports no torch.
"""

import io
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_opdlm.configuration import yaml_text
from megatron_opdlm.errors import InputError, nearest


def read_file(file: Path) -> Any:
    """The tree of a YAML file that holds sections."""
    try:
        text = file.read_text(encoding="utf-8")
        yaml_text.check(text)
        tree = OmegaConf.load(io.StringIO(text))
    except FileNotFoundError as error:
        raise InputError(
            f"configuration file {file} does not exist; configs/ holds ready ones"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"configuration file {file} cannot be read: {first_line(error)}"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(
            f"configuration file {file}: {_yaml_line(error)}{_yaml_problem(error)}"
        ) from error
    except (OmegaConfBaseException, ValueError) as error:  # e.g. "!!int x"
        raise InputError(f"configuration file {file}: {first_line(error)}") from error
    if not OmegaConf.is_dict(tree):
        raise InputError(f"configuration file {file} must hold sections (model:, data:, ...)")
    return tree


def read_override(text: str) -> Any:
    """The tree of ``section.key=VALUE``, VALUE in YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {text!r} is not of the form section.key=value")
    try:
        yaml_text.check(value)
        return OmegaConf.from_dotlist([text])
    except yaml.YAMLError as error:
        raise InputError(f"override {text!r}: {_yaml_problem(error)}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # e.g. "!!int x", "a[0]=1"
        raise InputError(f"override {text[:200]!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of a library's message."""
    return str(error).partition("\n")[0]


def _yaml_problem(error: yaml.YAMLError) -> str:
    return "not valid YAML: " + (getattr(error, "problem", None) or first_line(error))


def _yaml_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark else ""


def typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` if it has the type that ``hint`` names; an integer may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return None if value is None else typed(key, value, arguments[0])
    if origin is Literal:
        return _one_of(key, value, arguments)
    if origin is list and isinstance(value, list):
        return [typed(f"{key}[{i}]", item, arguments[0]) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            typed(f"a name in {key}", name, arguments[0]): typed(
                f"{key}.{name}", item, arguments[1]
            )
            for name, item in value.items()
        }
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is str and value is None:  # `train.out=` on a command line
        return ""
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise InputError(f"{key}={show(value)} must be {_TYPE_NAMES[origin or hint]}")


_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text (quote it if it looks like a number)",
    list: "a list, such as [a, b]",
    dict: "a mapping, such as {name: 1}",
}


def _one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise InputError(f"{key}={show(value)} must be one of {', '.join(allowed)}{hint}")
    return value


def show(value: Any) -> str:
    """A value as users wrote it."""
    return json.dumps(value, default=str)
