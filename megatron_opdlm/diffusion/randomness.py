"""Keyed randomness: every draw is a pure function of integers such as (seed, step, sample,
position, pass, purpose).

A counter-based generator: the keys are absorbed one after the other by the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). So a
sample's random numbers do not depend on its batch, on the parallel layout or on a resume, and
nothing has to be stored in a checkpoint but the seed.
"""

import torch
from torch import Tensor

# What a number is drawn for: two purposes never share a number.
DRAW_TOKEN = 0
CHOOSE_STATE = 1
MASK_RATE = 2
MASK_POSITION = 3
MIX = 4
INITIALISE = 5

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB
_UNIFORM_BITS = (
    48  # enough for any vocabulary, and u * total < total holds in float64 whatever the rounding
)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's shifts of int64 copy the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def absorb(state: Tensor, *keys: int | Tensor) -> Tensor:
    """Mixed bits (int64) of ``state`` and further keys, element by element: what is the same for
    many draws needs to be mixed once only. Numbers of the host make no tensor of their own, which a
    GPU would have to wait for.
    """
    for key in keys:
        key = key.to(torch.int64) if isinstance(key, Tensor) else key
        state = _finalise((state ^ key) + _GOLDEN)
    return state


def hash_keys(*keys: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """64 mixed bits (int64) for each element of the broadcast keys."""
    return absorb(torch.zeros((), dtype=torch.int64, device=device), *keys)


def uniform_of(bits: Tensor) -> Tensor:
    """Mixed bits (int64) -> float64 numbers in [0, 1) with 48 random bits."""
    return _shift(bits, 64 - _UNIFORM_BITS).to(torch.float64) * 2.0**-_UNIFORM_BITS


def uniform(*keys: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """float64 numbers in [0, 1) with 48 random bits, one for each element of the broadcast keys."""
    return uniform_of(hash_keys(*keys, device=device))
