"""Values of a ``config.json``, checked one by one. Every error names the file, the key, the value
and what to do.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError


def positive(config: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """A positive integer; ``default`` where it is missing or null, None for an error."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{path} has no {key}; this is no complete configuration of a model")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: {key}={value!r} is not a positive integer; correct the file")
    return value


def flag(config: Mapping[str, Any], key: str, path: Path, default: bool = False) -> bool:
    """True or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key}={value!r} is neither true nor false; correct the file")
    return value


def number(value: Any, key: str, path: Path) -> float:
    """A positive, finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= sys.float_info.max:  # NaN is in no range
        return float(value)
    raise InputError(f"{path}: {key}={value!r:.60} is not a positive number; correct the file")
