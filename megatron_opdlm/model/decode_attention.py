"""Attention of decoding by block rows: every row is one block of queries that sees a prefix of its
slot.

Blocks are aligned, and a block's queries see their own block and all before it. So whatever a
decoding window holds (a prompt, a finished block, a fresh one), it is a list of rows of B queries,
each with one number: how many positions of its slot it sees. No mask is left. All queries of a row
see the same, so the query heads that share a group's keys are more queries of it: keys and values
are read once per row and group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """R rows of B queries each, packed one after the other."""

    slot: Tensor  # [R] int32
    visible: Tensor  # [R] int32 positions of the slot that the row sees, its own block included
    table: Tensor  # [slots, pages of a slot] int32: which page holds which of its positions
    block_size: int
    kernel: "RowKernel"


# Queries [R, Q, groups, d] of the rows (B x query heads of a group), keys and values [pages,
# page_tokens, groups, d], the rows and the scale -> [R, Q, groups, d].
RowKernel = Callable[[Tensor, Tensor, Tensor, BlockRows, float], Tensor]


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, rows: BlockRows, scale: float
) -> Tensor:
    """query [R * B, heads, d] against keys and values [pages, page_tokens, groups, d] of the whole
    cache -> [R * B, heads, d].
    """
    groups, size = keys.shape[2], rows.block_size
    # Query head h belongs to group h // (heads / groups).
    packed = query.unflatten(1, (groups, -1)).unflatten(0, (-1, size)).transpose(2, 3).flatten(1, 2)
    out = rows.kernel(packed, keys, values, rows, scale)
    return out.unflatten(1, (size, -1)).transpose(2, 3).flatten(0, 1).flatten(1, 2)


def gathered(query: Tensor, keys: Tensor, values: Tensor, rows: BlockRows, scale: float) -> Tensor:
    """PyTorch's kernel over keys that are copied for every row: what the others are held to."""
    table = rows.table[rows.slot]
    position = torch.arange(table.shape[1] * keys.shape[1], device=keys.device)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys[table].flatten(1, 2).transpose(1, 2),
        values[table].flatten(1, 2).transpose(1, 2),
        attn_mask=(position < rows.visible[:, None])[:, None, None],
        scale=scale,
    )
    return out.transpose(1, 2)
