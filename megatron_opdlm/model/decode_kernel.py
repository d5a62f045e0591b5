"""Attention of block rows as a Triton kernel: keys and values are read once for every row and
group, straight from the pages of the row's slot.

A program computes the queries of one row and one group (block tokens x query heads of the group,
padded to the 16 that matrix units need) against the positions that the row sees, tile by tile with
a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
Run in Triton's interpreter and compiled for sm_80 and sm_90 by the tests; not run on a GPU yet.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from megatron_opdlm.model.decode_attention import BlockRows

TILE = 64  # positions; divides a page
LEAST_QUERIES = 16


@triton.jit
def attend_row(
    query,
    keys,
    values,
    out,
    slot,
    visible,
    table,
    table_width,
    scale,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """query and out [R, QUERIES, GROUPS, WIDTH], keys and values [pages, PAGE, GROUPS, WIDTH], slot
    and visible [R], table [slots, table_width], all contiguous; grid (R, GROUPS)."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number = tl.arange(0, QUERIES_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    offset = tl.arange(0, TILE)
    place = ((row * QUERIES + number) * GROUPS + group)[:, None] * WIDTH + column[None, :]
    inside = (number < QUERIES)[:, None] & (column < WIDTH)[None, :]
    q = tl.load(query + place, mask=inside, other=0.0)
    pages = table + tl.load(slot + row).to(tl.int64) * table_width
    end = tl.load(visible + row)
    top = tl.full([QUERIES_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES_PADDED], tl.float32)
    sums = tl.zeros([QUERIES_PADDED, WIDTH_PADDED], tl.float32)
    for start in range(0, end, TILE):
        page = tl.load(pages + start // PAGE).to(tl.int64)
        position = page * PAGE + start % PAGE + offset
        seen = start + offset < end
        where = (position * GROUPS + group)[:, None] * WIDTH + column[None, :]
        read = seen[:, None] & (column < WIDTH)[None, :]
        k = tl.load(keys + where, mask=read, other=0.0)
        v = tl.load(values + where, mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    result = sums / total[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def shapes(queries: int, groups: int, width: int, page_tokens: int) -> dict[str, int]:
    """The kernel's constants for these sizes."""
    tile = min(TILE, page_tokens)
    assert page_tokens % tile == 0, "a tile lies in one page"
    return {
        "PAGE": page_tokens,
        "GROUPS": groups,
        "QUERIES": queries,
        "QUERIES_PADDED": max(LEAST_QUERIES, triton.next_power_of_2(queries)),
        "WIDTH": width,
        "WIDTH_PADDED": max(16, triton.next_power_of_2(width)),
        "TILE": tile,
    }


def attend(query: Tensor, keys: Tensor, values: Tensor, rows: BlockRows, scale: float) -> Tensor:
    """A ``RowKernel``."""
    query = query.contiguous()
    count, queries, groups, width = query.shape
    out = torch.empty_like(query)
    kernel: Any = attend_row
    kernel[(count, groups)](
        query,
        keys,
        values,
        out,
        rows.slot,
        rows.visible,
        rows.table,
        rows.table.shape[1],
        scale,
        **shapes(queries, groups, width, keys.shape[1]),
    )
    return out
