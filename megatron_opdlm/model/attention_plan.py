"""Builds the ``AttentionPlan`` of a forward: which packed sequences are attended together, and how.

Index arithmetic happens on the host, where lengths and positions are known, with tensor operations
only; no step of it grows a Python loop with the number of sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opdlm.diffusion.masks import block_causal_visible
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.dense_attention import Bucket, group_bounds
from megatron_opdlm.model.kv_cache import KVCache
from megatron_opdlm.model.packed_row import PackedRow
from megatron_opdlm.model.row_split import RowSplit

__all__ = ["cached_plan", "causal_plan", "two_stream_plan"]

IN_PLACE = 0.5  # share of the slots from which on attending to all of them beats copying their keys


def causal_plan(
    lengths: Sequence[int],
    tokens: int,
    device: torch.device,
    *,
    read: Tensor | None = None,
    split: RowSplit | None = None,
) -> AttentionPlan:
    """Plain causal attention within each packed sequence: the teacher. ``read``: packed tokens
    whose final hidden states are wanted (None: all); with ``split``, places among a rank's own.
    """
    return _uncached(PackedRow(lengths=tuple(lengths), tokens=tokens, device=device), read, split)


def two_stream_plan(
    lengths: Sequence[int],
    block_N: Tensor,
    clean_N: Tensor,
    device: torch.device,
    *,
    branch_N: Tensor | None = None,
    read: Tensor | None = None,
    split: RowSplit | None = None,
) -> AttentionPlan:
    """Block-diffusion training attention within each packed [prompt | clean | noisy] sequence.

    ``block_N``: absolute position // B; ``clean_N``: False in the noisy copy; ``branch_N``: of
    trees (``packing/prefix_trees.py``; None: there are none); all on the host. Clean blocks of one
    token are the causal mask.
    ``read``: packed tokens whose final hidden states are wanted (None: all); with ``split``, places
    among a rank's own.
    """
    row = PackedRow(
        lengths=tuple(lengths),
        tokens=len(block_N),
        device=device,
        block=block_N,
        clean=clean_N,
        branch=branch_N,
    )
    return _uncached(row, read, split)


def _uncached(row: PackedRow, read: Tensor | None, split: RowSplit | None) -> AttentionPlan:
    read = None if read is None else read.to(row.device)
    if split is not None:
        split = split.to(row.device) if split.ranks > 1 else None
    return AttentionPlan(qkv_format="sbhd", row=row, read=read, split=split)


def cached_plan(
    lengths: Tensor,
    slots: Tensor,
    position_N: Tensor,
    key_positions: Tensor,
    block_size: int,
    cache: KVCache,
    device: torch.device,
    *,
    span: range | None = None,
    read: Tensor | None = None,
) -> AttentionPlan:
    """Decoding attention: ``lengths[i]`` new tokens of slot ``slots[i]``, whole blocks, at
    ``position_N`` against ``key_positions[i]`` cached positions. A slot is a page that holds the
    whole sequence. All tensors on the host; ``block_size`` 1 is causal.

    ``span``: the neighbouring slots that ``slots`` are among (None: all of the cache);
    ``read``: packed tokens whose final hidden states are wanted (None: all).
    """
    span = range(cache.pages) if span is None else span
    first = lengths.cumsum(0) - lengths
    short, two = lengths <= 2 * block_size, lengths == 2 * block_size
    # All queries of a block see the same. Windows of one or two blocks, which most are, take part
    # block by block; prompts of similar length as they are.
    last = _Rows(first + lengths - block_size, key_positions, slots).of(short)
    finished = _Rows(first, key_positions - block_size, slots).of(two)
    buckets = [
        _block_bucket(rows, block_size, span) for rows in (last, finished) if len(rows.first)
    ]
    for shortest, longest in group_bounds(lengths[~short]):
        inside = ~short & (lengths >= shortest) & (lengths <= longest)
        rows = _Rows(first, key_positions, slots).of(inside)
        buckets.append(_prompt_bucket(rows, lengths[inside], position_N, block_size))
    scatter = torch.empty(len(position_N), dtype=torch.int64)
    base = 0
    for bucket, real in buckets:
        place = torch.arange(base, base + bucket.gather.numel())
        scatter[bucket.gather[real]] = place.view_as(bucket.gather)[real]
        base += bucket.gather.numel()
    place = torch.repeat_interleave(slots, lengths) * cache.page_tokens + position_N
    return AttentionPlan(
        qkv_format="sbhd",
        buckets=tuple(bucket.to(device) for bucket, _ in buckets),
        scatter=scatter.to(device),
        cache=cache,
        cache_place=place.to(device),
        read=None if read is None else read.to(device),
    )


class _Rows(NamedTuple):
    """Runs of packed tokens, one after the other in a slot each."""

    first: Tensor  # [n] packed index of the first
    end: Tensor  # [n] positions of the slot that the last one sees
    slot: Tensor  # [n]

    def of(self, chosen: Tensor) -> "_Rows":
        return _Rows(self.first[chosen], self.end[chosen], self.slot[chosen])


def _block_bucket(rows: _Rows, block_size: int, span: range) -> tuple[Bucket, Tensor]:
    """One block each: a bucket, and which of its rows are real (bool [n])."""
    first, end, slots = rows
    real = torch.ones(len(first), dtype=torch.bool)
    where: Tensor | slice = slots
    if len(first) >= IN_PLACE * len(span):
        # One row for every slot, used or not, and its keys are read where they lie.
        index = slots - span.start
        first = torch.zeros(len(span), dtype=torch.int64).index_copy_(0, index, first)
        end = torch.full_like(first, block_size).index_copy_(0, index, end)
        real = torch.zeros(len(span), dtype=torch.bool).index_fill_(0, index, True)
        where = slice(span.start, span.stop)
    gather = first[:, None] + torch.arange(block_size)
    mask = torch.arange(int(end.max())) < end[:, None]
    return Bucket(gather=gather, mask=mask[:, None, None], slots=where), real


def _prompt_bucket(
    rows: _Rows, lengths: Tensor, position_N: Tensor, block_size: int
) -> tuple[Bucket, Tensor]:
    """Windows of several blocks: a bucket, and which of its places are real (bool [n, L])."""
    offset = torch.arange(int(lengths.max()))
    real = offset < lengths[:, None]
    gather = rows.first[:, None] + torch.where(real, offset, 0)
    keys = torch.arange(int(rows.end.max()))
    mask = block_causal_visible(position_N[gather][:, :, None], keys, block_size)
    return Bucket(gather=gather, mask=mask.unsqueeze(1), slots=rows.slot), real
