"""Serving engines take block size, passes and threshold from the command line only, never from
config.json: an export carries the files that say them.

- ``sglang.yaml``: for ``--dllm-algorithm-config``;
- ``lmdeploy.args``: flags for ``lmdeploy serve api_server DIR $(cat DIR/lmdeploy.args)``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from checkpoint_tools.export.training_record import TrainingRecord
from megatron_opdlm.errors import InputError

SGLANG, LMDEPLOY = "sglang.yaml", "lmdeploy.args"
# LMDeploy's names of the remasking rules that it knows.
STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential")
DEFAULT_THRESHOLD = 0.9  # the paper's


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How engines decode the model as its rollouts did."""

    block_size: int  # tokens
    denoising_steps: int  # passes
    threshold: float  # probability
    strategy: str  # one of STRATEGIES

    @property
    def lmdeploy_flags(self) -> list[str]:
        return [
            *("--backend", "pytorch"),
            *("--dllm-block-length", str(self.block_size)),
            *("--dllm-denoising-steps", str(self.denoising_steps)),
            *("--dllm-unmasking-strategy", self.strategy),
            *("--dllm-confidence-threshold", f"{self.threshold:g}"),
        ]


def engine_settings(block_size: int, record: TrainingRecord) -> EngineSettings:
    """The settings that the model was trained with, else one token a pass at the least."""
    strategy = record.settings.get("rollout.remasking")
    return EngineSettings(
        block_size=block_size,
        denoising_steps=int(record.settings.get("rollout.denoising_steps", block_size)),
        threshold=[DEFAULT_THRESHOLD, *record.thresholds][-1],
        strategy=strategy if strategy in STRATEGIES else STRATEGIES[0],
    )


def write_engine_settings(directory: Path, settings: EngineSettings) -> None:
    """Write both files into ``directory``."""
    (directory / SGLANG).write_text(
        "# sglang --dllm-algorithm LowConfidence --dllm-algorithm-config sglang.yaml\n"
        f"block_size: {settings.block_size}\n"
        f"threshold: {settings.threshold:g}\n"
    )
    (directory / LMDEPLOY).write_text(" ".join(settings.lmdeploy_flags) + "\n")


def read_sglang(directory: Path) -> dict[str, Any]:
    """``sglang.yaml`` as SGLang reads it. Raises InputError where it would not."""
    path = directory / SGLANG
    if not path.is_file():
        raise InputError(f"no {SGLANG}: SGLang would take blocks of 4 and a threshold of 0.95")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"{SGLANG} is no YAML") from None
    if not isinstance(content, dict):
        raise InputError(f"{SGLANG} holds no mapping")
    return content


def read_lmdeploy(directory: Path) -> dict[str, str]:
    """Flag -> value of ``lmdeploy.args``. Raises InputError where it is missing or odd."""
    path = directory / LMDEPLOY
    if not path.is_file():
        raise InputError(f"no {LMDEPLOY}: LMDeploy would take blocks of 4")
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        raise InputError(f"{LMDEPLOY} is no text in UTF-8") from None
    flags = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or not all(flag.startswith("--") for flag in flags):
        raise InputError(f"{LMDEPLOY} is no list of flags with values")
    return flags
