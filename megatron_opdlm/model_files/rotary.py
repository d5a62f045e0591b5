"""Rotary positions as ``config.json`` describes them: the base, and how a model's context was
stretched. model/rotary.py makes frequencies of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.config_values import flag, number, positive

KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """A stretched context; what belongs to another kind keeps its default.

    ``linear`` divides every frequency by ``factor``. ``llama3`` leaves those alone that turn more
    than ``high_freq_factor`` times within ``original_positions``, divides those that turn less than
    ``low_freq_factor`` times, and goes from one to the other in between. ``yarn`` (Peng et al.,
    arXiv 2309.00071) does so by dimension, between ``beta_fast`` and ``beta_slow`` turns, and
    scales the rotated queries and keys by ``attention_factor``.
    """

    kind: str  # one of KINDS
    factor: float
    original_positions: int = 0  # the context length before it was stretched, tokens
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn's bounds are whole dimensions

    def as_config(self) -> dict[str, Any]:
        """``rope_scaling`` of config.json, with nothing left to a reader's defaults."""
        record: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "linear":
            return record
        record["original_max_position_embeddings"] = self.original_positions
        if self.kind == "llama3":
            keys = ("low_freq_factor", "high_freq_factor")
        else:
            keys = ("attention_factor", "beta_fast", "beta_slow", "truncate")
        return record | {key: getattr(self, key) for key in keys}


def read_theta(config: Mapping[str, Any], path: Path, default: float | None) -> float:
    """The base of the frequencies. Transformers 4 writes a flat ``rope_theta``, transformers 5 a
    ``rope_parameters`` record; a file may have both. InputError where they differ: each reader
    would take its own.
    """
    nested, flat = (
        _record(config, "rope_parameters", path).get("rope_theta"),
        config.get("rope_theta"),
    )
    if nested is not None and flat is not None and nested != flat:
        raise InputError(
            f"{path}: rope_theta={flat!r}, but rope_parameters has rope_theta={nested!r}; keep the "
            "one that the model was trained with in both"
        )
    theta = next((found for found in (nested, flat, default) if found is not None), None)
    if theta is None:
        raise InputError(f"{path} has no rope_theta; add the value that the model was trained with")
    return number(theta, "rope_theta", path)


def read_scaling(config: Mapping[str, Any], path: Path, positions: int) -> RotaryScaling | None:
    """How the context was stretched; None: it was not. ``positions`` is max_position_embeddings.

    Raises InputError for a kind that is not built.
    """
    key, record = "rope_scaling", _record(config, "rope_scaling", path)
    if not record:
        key, record = "rope_parameters", _record(config, "rope_parameters", path)
    for holder in (config, record):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise InputError(
                f"{path}: partial_rotary_factor={holder['partial_rotary_factor']!r}; only 1, "
                "which rotates all of a head, is built"
            )
    kind = record.get("rope_type", record.get("type", "default"))
    if kind == "default":
        return None
    if kind not in KINDS:
        raise InputError(
            f"{path}: {key} has rope_type={kind!r}; built are {', '.join(KINDS)}, so remove it and "
            "stay within the original context length"
        )
    factor = number(record.get("factor"), f"{key}.factor", path)
    if kind == "linear":
        return RotaryScaling(kind=kind, factor=factor)
    original = positive(record, "original_max_position_embeddings", path, default=positions)
    if kind == "yarn":
        return _read_yarn(record, key, path, factor, original)
    low, high = (
        number(record.get(f"{which}_freq_factor"), f"{key}.{which}_freq_factor", path)
        for which in ("low", "high")
    )
    if not low < high:
        raise InputError(
            f"{path}: {key} has low_freq_factor={low} and high_freq_factor={high}; the first must "
            "be the smaller"
        )
    return RotaryScaling(
        kind=kind,
        factor=factor,
        original_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(
    record: Mapping[str, Any], key: str, path: Path, factor: float, original: int
) -> RotaryScaling:
    def optional(name: str) -> float | None:  # 0 is transformers' other word for "not given"
        value = record.get(name)
        return None if value in (None, 0) else number(value, f"{key}.{name}", path)

    mscale, all_dim, given = optional("mscale"), optional("mscale_all_dim"), "attention_factor"
    if record.get(given) is not None:
        attention = number(record[given], f"{key}.{given}", path)
    elif mscale and all_dim:
        attention = _mscale(factor, mscale) / _mscale(factor, all_dim)
    else:
        attention = _mscale(factor, 1.0)
    return RotaryScaling(
        kind="yarn",
        factor=factor,
        original_positions=original,
        attention_factor=attention,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=flag(record, "truncate", path, default=True),
    )


def _mscale(factor: float, weight: float) -> float:
    """YaRN's equation 22 for the square root of the temperature's inverse."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _record(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    record = config.get(key) or {}
    if not isinstance(record, dict):
        raise InputError(f"{path}: {key}={record!r} is no JSON object; copy the file again")
    return record
