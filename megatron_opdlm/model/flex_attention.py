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

from megatron_opdlm.diffusion.masks import block_causal_visible, two_stream_visible
from megatron_opdlm.model.packed_row import PackedRow

TILE = 128  # tokens; FlexAttention's own default
# (query, key) pairs whose visibility is computed at once while tiles are sorted: a few times 16 MiB
_PAIRS_AT_ONCE = 2**24
_SMALLEST = 1024  # tokens of the smallest row that kernels are compiled for
# Compilations that one process may need: sizes, with and without gradients, of two masks.
_COMPILATIONS = 128

# (query index, key index) -> bool, for tensors of indices that broadcast against each other.
Visible = Callable[[Tensor, Tensor], Tensor]


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
    visible = _visible(row, size)
    some, every = _occupied_tiles(visible, size, row.device)
    block_mask = BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=TILE,
        mask_mod=lambda batch, head, query, key: visible(query, key),
    )
    return FlexMask(block_mask=block_mask, size=size)


def _visible(row: PackedRow, size: int) -> Visible:
    """Visibility between any two places of the padded row."""
    document = row.documents(size).int().to(row.device)
    if row.block is None or row.clean is None:
        return lambda query, key: (
            (document[query] == document[key]) & block_causal_visible(query, key, 1)
        )
    padding = size - row.tokens
    block = F.pad(row.block, (0, padding)).int().to(row.device)
    clean = F.pad(row.clean, (0, padding), value=True).to(row.device)
    return lambda query, key: (
        (document[query] == document[key])
        & two_stream_visible(block[query], clean[query], block[key], clean[key])
    )


def _occupied_tiles(visible: Visible, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [T, T] twice: tiles in which some pair is visible, and those in which every pair is."""
    key = torch.arange(size, device=device)
    rows = max(1, _PAIRS_AT_ONCE // (TILE * size)) * TILE
    some, every = [], []
    for first in range(0, size, rows):
        pairs = visible(key[first : first + rows, None], key[None, :])
        tiles = pairs.view(-1, TILE, size // TILE, TILE)
        some.append(tiles.any(dim=3).any(dim=1))
        every.append(tiles.all(dim=3).all(dim=1))
    return torch.cat(some), torch.cat(every)


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
