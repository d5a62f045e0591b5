"""What a layer does element by element, against the same written out for autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.hardware.elementwise import rms_norm, rotate, swiglu

EPS = 1e-6


def written_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def written_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def written_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, 1, pairs, dtype=torch.float64)
    return angle.cos(), angle.sin()


CASES: dict[str, tuple[Callable, Callable, tuple[Tensor, ...]]] = {
    "norm": (
        lambda x, w: rms_norm(x, w, EPS),
        written_norm,
        (torch.randn(5, 1, 3, 8), torch.randn(8)),
    ),
    "swiglu": (swiglu, written_swiglu, (torch.randn(5, 1, 12),)),
    "rotation": (
        lambda x: rotate(x, *ANGLES),
        lambda x: written_rotation(x, *ANGLES),
        (torch.randn(5, 3, 8),),
    ),
}
ANGLES = angles(5, 4)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str):
    """Claim: the same values, with and without gradients, and the same gradients, also of an input
    that is a part of something wider."""
    ours, written, inputs = CASES[name]
    given = [x.double().requires_grad_() for x in inputs]
    expected = written(*given)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), given)
    wide = torch.cat([given[0], given[0]], dim=0)[: len(given[0])]  # a view
    found = ours(wide, *given[1:])
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), expected)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad((found * weight).sum(), given)
    torch.testing.assert_close(grads, expected_grads)


def test_norm_in_16_bits_is_rounded_once():
    x, weight = torch.randn(7, 16).bfloat16(), torch.randn(16).bfloat16()
    h = x.float()
    expected = weight.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))
    assert torch.equal(rms_norm(x, weight, EPS), expected.bfloat16())
