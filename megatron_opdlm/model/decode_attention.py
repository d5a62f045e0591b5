"""Attention of decoding by block rows: every row is one block of queries that sees a prefix of its
slot.

Blocks are aligned, and a block's queries see their own block and all before it. So whatever a
decoding window holds (a prompt, a finished block, a fresh one), it is a list of rows of B queries,
each with one number: how many positions of its slot it sees. No mask is left, which is what a
decoding kernel wants. FlashAttention's kernel for a KV cache where it is installed and fits (CUDA,
16-bit), else SDPA over gathered keys: the same sums, for tests and other dtypes. FlashAttention's
kernel has not run on a GPU yet.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """R rows of B queries each, packed one after the other."""

    slot: Tensor  # [R] int32
    visible: Tensor  # [R] int32 positions of the slot that the row sees, its own block included
    block_size: int


@functools.cache
def _flash_kernel() -> Callable[..., Any] | None:
    try:
        return importlib.import_module("flash_attn").flash_attn_with_kvcache
    except (ImportError, AttributeError):
        return None


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, rows: BlockRows, scale: float
) -> Tensor:
    """query [R * B, heads, d] against keys and values [slots, positions, groups, d] of the whole
    cache -> [R * B, heads, d].
    """
    query = query.unflatten(0, (-1, rows.block_size))
    kernel = _flash_kernel()
    if kernel is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        out = kernel(
            query,
            keys,
            values,
            cache_seqlens=rows.visible,
            cache_batch_idx=rows.slot,
            softmax_scale=scale,
            causal=False,
        )
        return out.flatten(0, 1)
    position = torch.arange(keys.shape[1], device=query.device)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys[rows.slot].transpose(1, 2),
        values[rows.slot].transpose(1, 2),
        attn_mask=(position < rows.visible[:, None])[:, None, None],
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2).flatten(0, 1)
