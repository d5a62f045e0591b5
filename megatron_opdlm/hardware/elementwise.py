"""What a layer does to its activations element by element, each function one node of the autograd
graph that keeps its input and nothing as large beside it.

Written out, each of them is four to ten operations, every one with a result of its own that
autograd keeps. On GPUs there are kernels for them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), computed in float32
    at least and rounded once; on GPUs one kernel of PyTorch's.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _normalised(x, weight, eps)[0]


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and the factor [..., 1] of each row."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (h * factor).mul_(weight).to(x.dtype), factor


class _RMSNorm(torch.autograd.Function):
    """With u = x f the normalised row, y = u w and f = (mean(x^2) + eps)^-1/2:
    dL/dx = f (w dL/dy - u mean(u w dL/dy)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, factor = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        wide = factor.dtype
        grad, scale = grads[0].to(wide), weight.to(wide)
        unit = x.to(wide) * factor
        of_weight = grad * unit
        mean = (of_weight @ scale).div_(len(scale)).unsqueeze(-1)
        grad_weight = of_weight.flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = torch.mul(grad, scale, out=of_weight)
        grad_x.addcmul_(unit, mean, value=-1).mul_(factor)
        return grad_x.to(x.dtype), grad_weight, None


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension (Shazeer, arXiv 2002.05202)."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(x)
    return _gated(x)


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        of_gate, of_up = grad_x.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        torch.mul(grad, F.silu(gate), out=of_up)
        return grad_x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., d] with its pairs of features (i, i + d / 2) turned by angles, given as their cosines
    and sines [..., d / 2].
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)
    return _turned(x, cos, sin, 1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sense: int) -> Tensor:
    """``sense`` -1 turns back. Each product is rounded, as in Megatron's and in transformers'."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (turned_a, turned_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=turned_a).sub_(b * sin, alpha=sense)
    torch.mul(b, cos, out=turned_b).add_(a * sin, alpha=sense)
    return out


class _Rotate(torch.autograd.Function):
    """Turning back is the gradient of turning."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None
