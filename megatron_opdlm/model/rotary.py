"""Rotary position embeddings (Su et al., arXiv 2104.09864) at explicit positions, with the
stretched contexts that model_files/rotary.py describes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.model_files.rotary import RotaryScaling


@dataclass(frozen=True, kw_only=True)
class ExplicitRope:
    """Rotary angles at explicit positions (the two streams share them)."""

    dim: int
    base: float
    scaling: RotaryScaling | None

    def angles(self, position_N: Tensor) -> Tensor:
        """[N, d / 2], products of elements in float32, never a matmul: TF32 would round the
        frequencies.
        """
        frequency = frequencies(self.dim, self.base, self.scaling, position_N.device)
        return position_N.float()[:, None] * frequency

    def rotation(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, d / 2] of N tokens, float32."""
        angle = self.angles(position_N)[:, None]
        return angle.cos(), angle.sin()


class MegatronRope(torch.nn.Module):
    """The angles as the fused kernel of Transformer Engine takes them: position_ids [1, N] ->
    [N, 1, 1, d].
    """

    def __init__(self, rope: ExplicitRope) -> None:
        super().__init__()
        self.rope = rope

    def forward(
        self, position_ids: Tensor, mrope_section: list[int] | None = None, cp_group: Any = None
    ) -> Tensor:
        angle = self.rope.angles(position_ids[0])
        return torch.cat((angle, angle), dim=-1)[:, None, None]


def frequencies(
    dim: int, base: float, scaling: RotaryScaling | None, device: torch.device
) -> Tensor:
    """Angle a position of each pair of a head's features, radians [d / 2], float32."""
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / (base ** (steps / dim))
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = (
        _kept_llama3(plain, scaling)
        if scaling.kind == "llama3"
        else _kept_yarn(base, steps, scaling)
    )
    return (1 - kept) * plain / scaling.factor + kept * plain


def _kept_llama3(plain: Tensor, scaling: RotaryScaling) -> Tensor:
    """The share of each frequency that stays as it is: 0 for waves too long for the original
    context, 1 for the short ones.
    """
    turns = scaling.original_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_yarn(base: float, steps: Tensor, scaling: RotaryScaling) -> Tensor:
    """The same by dimension: linear between those that turn ``beta_fast`` and ``beta_slow`` times
    within the original context (YaRN's equations 18 to 23).
    """
    dim = 2 * len(steps)

    def dimension(turns: float) -> float:
        length = scaling.original_positions / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    return 1 - ((steps / 2 - first) / (last - first)).clamp(0, 1)


def score_scale(head_dim: int, scaling: RotaryScaling | None) -> float:
    """Factor of a query's product with a key. YaRN's ``attention_factor`` scales both of them,
    which is the same and lets every kernel rotate as usual.
    """
    factor = 1.0 if scaling is None else scaling.attention_factor
    return factor**2 * head_dim**-0.5
