"""What a training checkpoint says about how its weights came to be: for model cards and serving
settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from megatron_opdlm.model_files.manifest import CONFIG
from megatron_opdlm.model_files.shape import read_json


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Counts and settings; an imported model has none."""

    counts: Mapping[str, Any] = field(default_factory=dict)  # state.json
    settings: Mapping[str, Any] = field(default_factory=dict)  # config.yaml by dotted key

    @property
    def thresholds(self) -> list[float]:
        """Confidence thresholds of the rollouts, first and last where they changed; none where
        rollouts had none.
        """
        if self.settings.get("rollout.remasking") != "low_confidence_dynamic":
            return []
        if self.settings.get("threshold_schedule.enabled"):
            keys = ("threshold_schedule.start", "threshold_schedule.end")
        else:
            keys = ("rollout.threshold",)
        return [float(self.settings[key]) for key in keys if key in self.settings]

    def name_of(self, key: str) -> str:
        """Last part of a path setting: a card names models, not directories of somebody's
        machine.
        """
        return PurePath(str(self.settings.get(key) or "")).name


def read_training_record(checkpoint: Path) -> TrainingRecord:
    """Read ``state.json`` and ``config.yaml`` of a checkpoint; empty where it has none."""
    state, config = checkpoint / "state.json", checkpoint / CONFIG
    counts = read_json(state) if state.is_file() else {}
    sections = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    settings = {
        f"{section}.{key}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return TrainingRecord(counts=counts, settings=settings)
