"""Backend ``flex``: PyTorch's FlexAttention on the packed row itself, whose tiles of 128 x 128
(query, key) pairs are skipped where nobody sees anybody.

No mask of N x N is stored: the kernel evaluates the predicate inside the tiles that need it, and a
``BlockMask`` says which tiles are empty, full or mixed. Compiled on a GPU. Uncompiled (on a CPU)
the same call materialises its scores and has no backward pass: good for comparing, not for work.
The compiled kernel has run on a CPU, forward only; not on a GPU yet.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_opdlm.diffusion.masks import (
    TRUNK,
    block_causal_visible,
    branch_visible,
    two_stream_visible,
)
from megatron_opdlm.model.mask_tiles import Tokens, Visible, occupied_tiles
from megatron_opdlm.model.packed_row import PackedRow

TILE = 128  # tokens; FlexAttention's own default
_SMALLEST = 1024  # tokens of the smallest row that kernels are compiled for
# Compilations that one process may need: sizes, with and without gradients, of two masks.
_COMPILATIONS = 128


@dataclass(frozen=True, kw_only=True)
class FlexMask:
    """The mask of one packed row, made once and used by every layer."""

    block_mask: BlockMask
    size: int  # tokens of the row with its padding


def padded_size(tokens: int) -> int:
    """The row length that kernels are compiled for: a power of two, from 1,024 on. A compilation
    takes seconds to a minute, padding next to nothing: of its tiles only those beside the diagonal
    are computed. So rows of up to 4,096 tokens have three sizes.
    """
    return max(_SMALLEST, 1 << (tokens - 1).bit_length())


def flex_mask(row: PackedRow) -> FlexMask:
    """The row's mask, from the one predicate of each kind in ``diffusion/masks.py``."""
    size = padded_size(row.tokens)
    tokens = _tokens(row, size)
    visible = _visible(row, tokens)
    some, every = occupied_tiles(tokens, visible, TILE)
    block_mask = BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=TILE,
        mask_mod=lambda batch, head, query, key: visible(query, key),
    )
    return FlexMask(block_mask=block_mask, size=size)


def _tokens(row: PackedRow, size: int) -> Tokens:
    """What the padded row's tokens are; a causal row's are blocks of one clean token each."""
    padding = size - row.tokens
    document = row.documents(size).int()
    if row.block is None or row.clean is None:
        block, clean = torch.arange(size), torch.ones(size, dtype=torch.bool)
    else:
        block = F.pad(row.block, (0, padding))
        clean = F.pad(row.clean, (0, padding), value=True)
    branch = torch.full((size,), TRUNK, dtype=torch.int32)
    if row.branch is not None:
        branch[: row.tokens] = row.branch
    return Tokens(
        document=document.to(row.device),
        block=block.int().to(row.device),
        clean=clean.to(row.device),
        branch=branch.to(row.device),
    )


def _visible(row: PackedRow, tokens: Tokens) -> Visible:
    """Visibility between any two places of the padded row."""
    document, block, clean, branch = tokens.document, tokens.block, tokens.clean, tokens.branch
    if row.causal:
        return lambda query, key: (
            (document[query] == document[key]) & block_causal_visible(query, key, 1)
        )
    return lambda query, key: (
        (document[query] == document[key])
        & branch_visible(branch[query], branch[key])
        & two_stream_visible(block[query], clean[query], block[key], clean[key])
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [T, T] -> how many tiles each row of tiles has [1, 1, T], and which, first in the list
    [1, 1, T, T]: FlexAttention's form, for one batch entry and all heads.
    """
    count = tiles.sum(dim=-1, dtype=torch.int32)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[None, None], order[None, None]


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask, scale: float) -> Tensor:
    """query [N, heads, d], key and value [N, groups, d] -> [N, heads, d]."""
    tokens = len(query)
    out: Any = _kernel(query.device)(
        _row(query, mask.size),
        _row(key, mask.size),
        _row(value, mask.size),
        block_mask=mask.block_mask,
        scale=scale,
        enable_gqa=True,
    )
    return out[0, :, :tokens].transpose(0, 1)


def _row(x: Tensor, size: int) -> Tensor:
    """x [N, heads, d] -> [1, heads, size, d], zeros beyond N."""
    return F.pad(x.transpose(0, 1), (0, 0, 0, size - len(x)))[None]


def _kernel(device: torch.device) -> Callable[..., Any]:
    """What attends there.

    Beyond PyTorch's default of 8 compilations a compiled kernel would fall back, silently, to the
    form that materialises all scores; ``fullgraph`` makes an error of that, and the limit is
    raised: here, for the thread that calls, since from torch 2.12 on it is a context variable
    (``torch/utils/_config_module.py``, ``user_override``), and autograd, which computes a layer
    anew in the backward pass, has a thread of its own for each GPU.
    """
    if device.type == "cpu":
        return flex_attention
    config: Any = torch._dynamo.config
    if config.recompile_limit < _COMPILATIONS:
        config.recompile_limit = _COMPILATIONS
    return compiled_kernel()


@functools.cache
def compiled_kernel() -> Callable[..., Any]:
    """FlexAttention compiled for each size that it meets."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
