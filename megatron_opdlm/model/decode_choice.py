"""Which attention decodes, and why: ``rollout.attention`` for one model on this hardware."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.model.decode_attention import BlockRows, RowKernel, gathered

WIDEST_HEAD = 256  # of both kernels


@dataclass(frozen=True, kw_only=True)
class DecodeAttention:
    """What computes a decoding pass's attention."""

    name: str
    kernel: RowKernel | None  # None: buckets
    reason: str

    def __str__(self) -> str:
        return f"decoding by {self.name} ({self.reason})"


def choose_decode_attention(
    name: str, dtype: torch.dtype, head_dim: int, hardware: Hardware
) -> DecodeAttention:
    """``auto`` takes the first of the hardware's that can be imported and takes this type and head
    size.

    Raises InputError where a named one cannot run here.
    """
    faults: list[str] = []
    for one in hardware.decode_attention if name == "auto" else (name,):
        made = _kernel(one, dtype, head_dim, hardware)
        if not isinstance(made, str):
            reason = "; ".join(faults) or ("asked for" if name == one else "preferred here")
            return DecodeAttention(name=one, kernel=made, reason=reason)
        faults.append(made)
    raise InputError(
        f"rollout.attention={name} cannot run here: {'; '.join(faults)}; use rollout.attention=auto"
    )


def _kernel(
    name: str, dtype: torch.dtype, head_dim: int, hardware: Hardware
) -> RowKernel | str | None:
    """The kernel (None: buckets need none), or why it cannot run."""
    if name == "buckets":
        return None
    if name == "rows":
        return gathered
    if hardware.device.type == "cpu":
        return f"{name} needs a GPU"
    if head_dim > WIDEST_HEAD:
        return f"{name} takes heads of at most {WIDEST_HEAD} numbers, not {head_dim}"
    return _triton() if name == "triton" else _flash(dtype, head_dim)


def _triton() -> RowKernel | str:
    try:
        return importlib.import_module("megatron_opdlm.model.decode_kernel").attend
    except ImportError as error:
        return f"triton cannot be imported ({error})"


def _flash(dtype: torch.dtype, head_dim: int) -> RowKernel | str:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash computes in 16 bits, not in {dtype}"
    if head_dim % 8:
        return f"flash takes heads of multiples of 8 numbers, not {head_dim}"
    try:
        kernel: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_with_kvcache
    except (ImportError, AttributeError) as error:
        return f"flash-attn cannot be imported ({error})"

    return _Flash(kernel)


@dataclass(frozen=True)
class _Flash:
    """flash-attn over pages; two of the same kernel are equal."""

    kernel: Callable[..., Any]

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, rows: BlockRows, scale: float
    ) -> Tensor:
        return self.kernel(
            query,
            keys,
            values,
            cache_seqlens=rows.visible,
            block_table=rows.table[rows.slot],
            softmax_scale=scale,
            causal=False,
        )
