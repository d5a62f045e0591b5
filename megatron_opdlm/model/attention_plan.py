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


def causal_plan(lengths: Sequence[int], tokens: int, device: torch.device) -> AttentionPlan:
    """Plain causal attention within each packed sequence: the teacher."""
    rows, scatter = _bucket_rows(torch.tensor(lengths), tokens)
    buckets = []
    for members, gather, _ in rows:
        position = torch.arange(gather.shape[1], device=device)
        mask = block_causal_visible(position[:, None], position[None, :], 1)
        expanded = mask.expand(len(members), 1, -1, -1)
        buckets.append(Bucket(gather=gather.to(device), mask=expanded))
    return AttentionPlan(qkv_format="sbhd", buckets=tuple(buckets), scatter=scatter.to(device))


def two_stream_plan(
    lengths: Sequence[int], block_N: Tensor, clean_N: Tensor, device: torch.device
) -> AttentionPlan:
    """Block-diffusion training attention within each packed [prompt | clean | noisy] sequence.

    ``block_N``: absolute position // B; ``clean_N``: False in the noisy copy; both on the host.
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
    return AttentionPlan(qkv_format="sbhd", buckets=tuple(buckets), scatter=scatter.to(device))


def cached_plan(
    lengths: Tensor,
    slots: Tensor,
    position_N: Tensor,
    key_positions: Tensor,
    block_size: int,
    cache: KVCache,
    device: torch.device,
) -> AttentionPlan:
    """Decoding attention: ``lengths[i]`` new tokens of slot ``slots[i]`` at ``position_N`` against
    ``key_positions[i]`` cached positions. All tensors on the host; ``block_size`` 1 is causal.
    """
    rows, scatter = _bucket_rows(lengths, len(position_N))
    buckets = []
    for members, gather, _ in rows:
        keys = torch.arange(int(key_positions[members].max()), device=device)
        query = position_N[gather].to(device)
        mask = block_causal_visible(query[:, :, None], keys[None, None, :], block_size)
        everything = len(members) == cache.slots
        bucket_slots = None if everything else slots[members].to(device)
        buckets.append(Bucket(gather=gather.to(device), mask=mask.unsqueeze(1), slots=bucket_slots))
    return AttentionPlan(
        qkv_format="sbhd",
        buckets=tuple(buckets),
        scatter=scatter.to(device),
        cache=cache,
        cache_slot=torch.repeat_interleave(slots, lengths).to(device),
        cache_position=position_N.to(device),
    )
