"""The attention slot: Megatron's ``core_attention`` with our masks. Backend ``dense``: SDPA with a
materialised mask.

A packed row [N tokens] is attended in *buckets*: sequences of similar length gathered to rows [n,
L], each with its own small mask, so the cost is that of the sequences and not of the N x N square.
The plan of a forward (buckets, masks, cache) is built once and travels to every layer inside
``packed_seq_params``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_opdlm.diffusion.masks import block_causal_visible, two_stream_visible
from megatron_opdlm.model.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sequences that are attended together."""

    gather: Tensor  # [n, L] into the packed row; beyond a sequence's end its first token repeats
    mask: Tensor  # [n, 1, L, keys] bool, True = may attend
    slots: Tensor | None = (
        None  # [n] cache slots; None: all slots in order (with a cache), no cache otherwise
    )


@dataclass
class AttentionPlan(PackedSeqParams):
    """Everything that attention needs to know about one forward. ``qkv_format`` is "sbhd" with one
    packed row.
    """

    buckets: tuple[Bucket, ...] = ()
    scatter: Tensor | None = (
        None  # [N] place of each packed token among the buckets' flattened rows
    )
    cache: KVCache | None = None
    cache_slot: Tensor | None = None  # [N] where new keys and values go
    cache_position: Tensor | None = None  # [N]


class MaskedAttention(torch.nn.Module):
    """Grouped-query attention under an ``AttentionPlan``. Has no parameters."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        scale = kwargs.get("softmax_scale")
        self.scale: float = config.kv_channels**-0.5 if scale is None else scale

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to store."""
        return {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionPlan | None = None,
    ) -> Tensor:
        """query [N, 1, heads, d], key and value [N, 1, groups, d] -> [N, 1, heads * d]; keys arrive
        with RoPE applied.
        """
        plan = packed_seq_params
        assert isinstance(plan, AttentionPlan), (
            "our attention is driven by an AttentionPlan in packed_seq_params"
        )
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.cache is not None:
            assert plan.cache_slot is not None and plan.cache_position is not None
            plan.cache.write(self.layer_number, plan.cache_slot, plan.cache_position, key, value)
        rows = [self._attend(bucket, query, key, value, plan.cache) for bucket in plan.buckets]
        assert plan.scatter is not None
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        return flat.index_select(0, plan.scatter).flatten(1).unsqueeze(1)

    def _attend(
        self, bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, cache: KVCache | None
    ) -> Tensor:
        """Attention of one bucket -> [n * L, heads, d]."""
        q = _gather(query, bucket.gather)
        if cache is None:
            k, v = _gather(key, bucket.gather), _gather(value, bucket.gather)
        else:
            k, v = cache.read(self.layer_number, bucket.slots, bucket.mask.shape[-1])
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bucket.mask,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).flatten(0, 1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [N, heads, d] at index [n, L] -> [n, L, heads, d]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def group_by_length(lengths: Sequence[int], waste: float = 0.25) -> list[list[int]]:
    """Indices of sequences grouped so that padding a group to its longest wastes at most ``waste``
    of a row.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[index] >= (1 - waste) * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _rows(starts: list[int], lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Gather index [n, L] of packed sequences and which of its places are real (bool [n, L])."""
    start = torch.tensor(starts, device=device)[:, None]
    length = torch.tensor(lengths, device=device)[:, None]
    offset = torch.arange(max(lengths), device=device)[None]
    real = offset < length
    return start + torch.where(real, offset, 0), real


def _plan(
    lengths: Sequence[int], tokens: int, device: torch.device
) -> tuple[list[tuple[list[int], Tensor]], Tensor]:
    """Buckets (members, gather index) of the packed sequences, and the scatter index [N].

    ``tokens`` may exceed the sum of lengths: the alignment tail reads row 0 and nobody reads it.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    buckets: list[tuple[list[int], Tensor]] = []
    scatter = torch.zeros(tokens, dtype=torch.int64, device=device)
    base = 0
    for members in group_by_length(lengths):
        gather, real = _rows([starts[i] for i in members], [lengths[i] for i in members], device)
        scatter[gather[real]] = base + torch.arange(gather.numel(), device=device)[real.flatten()]
        base += gather.numel()
        buckets.append((members, gather))
    return buckets, scatter


def causal_plan(lengths: Sequence[int], tokens: int, device: torch.device) -> AttentionPlan:
    """Plain causal attention within each packed sequence: the teacher."""
    buckets, scatter = _plan(lengths, tokens, device)
    built = []
    for members, gather in buckets:
        position = torch.arange(gather.shape[1], device=device)
        mask = block_causal_visible(position[:, None], position[None, :], 1)
        built.append(Bucket(gather=gather, mask=mask.expand(len(members), 1, -1, -1)))
    return AttentionPlan(qkv_format="sbhd", buckets=tuple(built), scatter=scatter)


def two_stream_plan(lengths: Sequence[int], block_N: Tensor, clean_N: Tensor) -> AttentionPlan:
    """Block-diffusion training attention within each packed [prompt | clean | noisy] sequence."""
    buckets, scatter = _plan(lengths, len(block_N), block_N.device)
    built = []
    for members, gather in buckets:
        block, clean = block_N[gather], clean_N[gather]
        mask = two_stream_visible(
            block[:, :, None], clean[:, :, None], block[:, None, :], clean[:, None, :]
        )
        length = torch.tensor([lengths[i] for i in members], device=gather.device)
        real = torch.arange(gather.shape[1], device=gather.device) < length[:, None]
        # A place beyond the end repeats the first token, which must not be seen twice.
        built.append(Bucket(gather=gather, mask=(mask & real[:, None, :]).unsqueeze(1)))
    return AttentionPlan(qkv_format="sbhd", buckets=tuple(built), scatter=scatter)


def cached_plan(
    lengths: Sequence[int],
    slots: Sequence[int],
    position_N: Tensor,
    key_positions: Sequence[int],
    block_size: int,
    cache: KVCache,
) -> AttentionPlan:
    """Decoding attention: ``lengths[i]`` new tokens of slot ``slots[i]`` against
    ``key_positions[i]`` cached positions.

    ``block_size`` 1 is causal decoding.
    """
    device = position_N.device
    buckets, scatter = _plan(lengths, len(position_N), device)
    slot = torch.tensor(slots, device=device)
    built = []
    for members, gather in buckets:
        keys = torch.arange(max(key_positions[i] for i in members), device=device)
        mask = block_causal_visible(position_N[gather][:, :, None], keys[None, None, :], block_size)
        built.append(Bucket(gather=gather, mask=mask.unsqueeze(1), slots=slot[members]))
    repeats = torch.tensor(lengths, device=device)
    return AttentionPlan(
        qkv_format="sbhd",
        buckets=tuple(built),
        scatter=scatter,
        cache=cache,
        cache_slot=torch.repeat_interleave(slot, repeats),
        cache_position=position_N,
    )
