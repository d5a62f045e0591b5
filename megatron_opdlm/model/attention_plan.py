"""Builds the ``AttentionPlan`` of a forward: which packed sequences are attended together, and how.

Index arithmetic happens on the host, where lengths and positions are known, with tensor operations
only; no step of it grows a Python loop with the number of sequences.
"""

from collections.abc import Sequence

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
    read: Tensor | None = None,
    split: RowSplit | None = None,
) -> AttentionPlan:
    """Block-diffusion training attention within each packed [prompt | clean | noisy] sequence.

    ``block_N``: absolute position // B; ``clean_N``: False in the noisy copy; both on the host.
    ``read``: packed tokens whose final hidden states are wanted (None: all); with ``split``, places
    among a rank's own.
    """
    row = PackedRow(
        lengths=tuple(lengths), tokens=len(block_N), device=device, block=block_N, clean=clean_N
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
