"""Builds the ``AttentionPlan`` of a forward: which packed sequences are attended together, and how.

Index arithmetic happens on the host, where lengths and positions are known, with tensor operations
only; no step of it grows a Python loop with the number of sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opdlm.diffusion.masks import block_causal_visible, two_stream_visible
from megatron_opdlm.model.attention import AttentionPlan, Bucket
from megatron_opdlm.model.kv_cache import KVCache

WASTE = 0.25  # share of a bucket's row that padding to its longest sequence may take
IN_PLACE = 0.5  # share of the slots from which on attending to all of them beats copying their keys


class _Rows(NamedTuple):
    """Sequences of similar length."""

    members: Tensor  # [n] which packed sequences
    gather: Tensor  # [n, L] indices into the packed row; beyond a sequence's end its first token
    real: Tensor  # bool [n, L]


def group_bounds(lengths: Tensor, waste: float = WASTE) -> list[tuple[int, int]]:
    """(shortest, longest) length of each bucket, longest bucket first.

    The loop runs over buckets: their number grows with the logarithm of the spread of lengths.
    """
    bounds: list[tuple[int, int]] = []
    left = lengths.unique()
    while len(left):
        longest = int(left[-1])
        inside = left >= (1 - waste) * longest
        bounds.append((int(left[inside][0]), longest))
        left = left[~inside]
    return bounds


def packed_pairs(lengths: Sequence[int]) -> int:
    """(query, key) pairs that the plan of a packed row computes, hidden ones included."""
    each = torch.tensor(lengths)
    return sum(
        int(((each >= shortest) & (each <= longest)).sum()) * longest**2
        for shortest, longest in group_bounds(each)
    )


def _bucket_rows(lengths: Tensor, tokens: int) -> tuple[list[_Rows], Tensor]:
    """Buckets of the packed sequences, and each packed token's place among their flattened rows.

    ``tokens`` may exceed the sum of lengths: the alignment tail reads place 0, and nobody reads it.
    """
    starts = lengths.cumsum(0) - lengths
    scatter = torch.zeros(tokens, dtype=torch.int64)
    rows: list[_Rows] = []
    base = 0
    for shortest, longest in group_bounds(lengths):
        members = torch.nonzero((lengths >= shortest) & (lengths <= longest)).flatten()
        offset = torch.arange(longest)
        real = offset < lengths[members, None]
        gather = starts[members, None] + torch.where(real, offset, 0)
        scatter[gather[real]] = base + torch.arange(gather.numel())[real.flatten()]
        base += gather.numel()
        rows.append(_Rows(members, gather, real))
    return rows, scatter


def causal_plan(
    lengths: Sequence[int], tokens: int, device: torch.device, *, read: Tensor | None = None
) -> AttentionPlan:
    """Plain causal attention within each packed sequence: the teacher. ``read``: packed tokens
    whose final hidden states are wanted (None: all).
    """
    rows, scatter = _bucket_rows(torch.tensor(lengths), tokens)
    buckets = []
    for members, gather, _ in rows:
        position = torch.arange(gather.shape[1], device=device)
        mask = block_causal_visible(position[:, None], position[None, :], 1)
        expanded = mask.expand(len(members), 1, -1, -1)
        buckets.append(Bucket(gather=gather.to(device), mask=expanded))
    return _uncached(buckets, scatter, read, device)


def two_stream_plan(
    lengths: Sequence[int],
    block_N: Tensor,
    clean_N: Tensor,
    device: torch.device,
    *,
    read: Tensor | None = None,
) -> AttentionPlan:
    """Block-diffusion training attention within each packed [prompt | clean | noisy] sequence.

    ``block_N``: absolute position // B; ``clean_N``: False in the noisy copy; both on the host.
    ``read``: packed tokens whose final hidden states are wanted (None: all).
    """
    rows, scatter = _bucket_rows(torch.tensor(lengths), len(block_N))
    buckets = []
    for _, gather, real in rows:
        block, clean = block_N[gather].to(device), clean_N[gather].to(device)
        mask = two_stream_visible(
            block[:, :, None], clean[:, :, None], block[:, None, :], clean[:, None, :]
        )
        # A place beyond the end repeats the first token, which must not be seen twice.
        mask = (mask & real.to(device)[:, None, :]).unsqueeze(1)
        buckets.append(Bucket(gather=gather.to(device), mask=mask))
    return _uncached(buckets, scatter, read, device)


def _uncached(
    buckets: list[Bucket], scatter: Tensor, read: Tensor | None, device: torch.device
) -> AttentionPlan:
    return AttentionPlan(
        qkv_format="sbhd",
        buckets=tuple(buckets),
        scatter=scatter.to(device),
        read=None if read is None else read.to(device),
    )


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
    """Decoding attention: ``lengths[i]`` new tokens of slot ``slots[i]`` at ``position_N`` against
    ``key_positions[i]`` cached positions. All tensors on the host; ``block_size`` 1 is causal.

    ``span``: the neighbouring slots that ``slots`` are among (None: all of the cache);
    ``read``: packed tokens whose final hidden states are wanted (None: all).
    """
    span = range(cache.slots) if span is None else span
    starts = lengths.cumsum(0) - lengths
    scatter = torch.zeros(len(position_N), dtype=torch.int64)
    buckets = []
    base = 0
    for members in _cached_buckets(lengths, block_size):
        rows = members
        bucket_slots: Tensor | slice = slots[members].to(device)
        if len(members) >= IN_PLACE * len(span):
            # One row for every slot, used or not, and its keys are read where they lie.
            rows = torch.full((len(span),), -1)
            rows[slots[members] - span.start] = members
            bucket_slots = slice(span.start, span.stop)
        used = rows >= 0
        length = torch.where(used, lengths[rows], 0)
        offset = torch.arange(int(length.max()))
        real = offset < length[:, None]
        gather = torch.where(used, starts[rows], 0)[:, None] + torch.where(real, offset, 0)
        scatter[gather[real]] = base + torch.nonzero(real.flatten()).flatten()
        base += gather.numel()
        keys = torch.arange(int(key_positions[members].max()))
        visible = block_causal_visible(position_N[gather][:, :, None], keys, block_size)
        mask = _additive(visible.unsqueeze(1), cache.dtype).to(device)
        buckets.append(Bucket(gather=gather.to(device), mask=mask, slots=bucket_slots))
    return AttentionPlan(
        qkv_format="sbhd",
        buckets=tuple(buckets),
        scatter=scatter.to(device),
        cache=cache,
        cache_slot=torch.repeat_interleave(slots, lengths).to(device),
        cache_position=position_N.to(device),
        read=None if read is None else read.to(device),
    )


def _cached_buckets(lengths: Tensor, block_size: int) -> list[Tensor]:
    """Which windows are attended together: all of one or two blocks, and prompts by length."""
    short = lengths <= 2 * block_size
    buckets = [torch.nonzero(short).flatten()] if bool(short.any()) else []
    for shortest, longest in group_bounds(lengths[~short]):
        inside = ~short & (lengths >= shortest) & (lengths <= longest)
        buckets.append(torch.nonzero(inside).flatten())
    return buckets


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere: made once here, or in every layer by the kernel."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
