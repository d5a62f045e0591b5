"""How to decode: the record of generation settings of rollout, sampling and evaluation."""

import math
from dataclasses import dataclass, replace

from megatron_opdlm.errors import InputError, nearest

MODES = ("diffusion", "ar")
# Written out because this file imports no torch; a test holds it equal to denoising.REMASKING.
REMASKING = (
    "low_confidence_static",
    "low_confidence_dynamic",
    "sequential",
    "entropy_bounded",
)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of one generation. ``mode="ar"`` reads temperature, top-p, top-k, the length limit
    and the seed only.
    """

    mode: str = "diffusion"
    block_size: int = 4  # tokens per block
    denoising_steps: int = 4  # passes per block; more than block_size leaves the last ones empty
    remasking: str = "low_confidence_static"
    threshold: float = 0.9  # probability; low_confidence_dynamic commits strictly above it
    entropy_bound: float = 0.35  # nats, summed over a pass; entropy_bounded
    temperature: float = 0.0  # 0: arg-max
    top_p: float = 1.0  # probability mass kept; 1: all
    top_k: int = 0  # tokens kept; 0: all
    max_new_tokens: int = 2048  # response tokens
    seed: int = 0
    logit_shift: bool = False  # position i is read from logits i - 1

    def validate(self) -> "Decoding":
        """Check every value; returns itself so that it can be chained. InputError: value, rule,
        remedy.
        """
        _check_name("mode", self.mode, MODES)
        _check_name("remasking", self.remasking, REMASKING)
        _check_at_least("block_size", self.block_size, 1)
        _check_at_least("denoising_steps", self.denoising_steps, 1)
        _check_between("threshold", self.threshold, 0.0, 1.0)
        _check_between("entropy_bound", self.entropy_bound, 0.0, math.inf)
        _check_between("temperature", self.temperature, 0.0, math.inf)
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(
                f"top_p={self.top_p}: a probability mass; use above 0 up to 1 (1 keeps all)"
            )
        _check_at_least("top_k", self.top_k, 0)
        _check_at_least("max_new_tokens", self.max_new_tokens, 1)
        _check_at_least("seed", self.seed, 0)
        return self

    def autoregressive(self) -> "Decoding":
        """The same sampling as blocks of one token: one pass, logits from the position before."""
        return replace(
            self,
            block_size=1,
            denoising_steps=1,
            remasking="low_confidence_static",
            logit_shift=True,
        )


def _check_name(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise InputError(f"{name}={value}: not a known name; use {', '.join(allowed)}{hint}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}={value}: use a whole number of {least} or more")


def _check_between(name: str, value: float, low: float, high: float) -> None:
    """Bounds are included; NaN and infinity are refused."""
    if not (low <= value <= high and math.isfinite(value)):
        raise InputError(
            f"{name}={value}: use a number from {low:g}"
            + (f" to {high:g}" if math.isfinite(high) else " up")
        )
