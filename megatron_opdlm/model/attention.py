"""The attention slot: Megatron's ``core_attention`` with our masks. Backend ``dense``: SDPA with a
materialised mask; decoding has a second form, ``decode_attention.py``.

A packed row [N tokens] is attended in *buckets*: sequences of similar length gathered to rows [n,
L], each with its own small mask, so the cost is that of the sequences and not of the N x N square.
The plan of a forward (buckets, masks, cache) is built once and travels to every layer inside
``packed_seq_params``.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_opdlm.model.decode_attention import BlockRows, attend_rows
from megatron_opdlm.model.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sequences that are attended together."""

    gather: Tensor  # [n, L] into the packed row; beyond a sequence's end its first token repeats
    mask: Tensor  # [n, 1, L, keys] bool, True = may attend; or what is added to the scores
    # Cache slots of the n sequences: [n], or a run of neighbours, whose keys are read in place.
    slots: Tensor | slice | None = None


@dataclass
class AttentionPlan(PackedSeqParams):
    """Everything that attention needs to know about one forward. ``qkv_format`` is "sbhd" with one
    packed row.
    """

    buckets: tuple[Bucket, ...] = ()
    rows: BlockRows | None = None  # decoding without buckets
    scatter: Tensor | None = (
        None  # [N] place of each packed token among the buckets' flattened rows
    )
    cache: KVCache | None = None
    cache_slot: Tensor | None = None  # [N] where new keys and values go
    cache_position: Tensor | None = None  # [N]
    # [M] packed tokens whose final hidden states are wanted; None: all N of them. The last layer
    # needs no more of the others than their keys and values.
    read: Tensor | None = None

    def rows_after(self, layer_number: int, config: Any) -> Tensor | None:
        """Packed tokens that go on after this layer's attention, None for all of them.

        Under sequence parallelism every rank keeps its equal share of the rows to the end.
        """
        last = layer_number == config.num_layers and not config.sequence_parallel
        return self.read if last else None


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
        self.config, self.layer_number = config, layer_number
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
        """query [N, 1, heads, d], key and value [N, 1, groups, d] -> [N, 1, heads * d], in the last
        layer [M, 1, heads * d] where the plan reads M rows only; keys arrive with RoPE applied.
        """
        plan = packed_seq_params
        assert isinstance(plan, AttentionPlan), (
            "our attention is driven by an AttentionPlan in packed_seq_params"
        )
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.cache is not None:
            assert plan.cache_slot is not None and plan.cache_position is not None
            plan.cache.write(self.layer_number, plan.cache_slot, plan.cache_position, key, value)
        wanted = plan.rows_after(self.layer_number, self.config)
        if plan.rows is not None:
            assert plan.cache is not None
            keys, values = plan.cache.layer(self.layer_number)
            flat = attend_rows(query, keys, values, plan.rows, self.scale)
            flat = flat if wanted is None else flat.index_select(0, wanted)
            return flat.flatten(1).unsqueeze(1)
        rows = [self._attend(bucket, query, key, value, plan.cache) for bucket in plan.buckets]
        assert plan.scatter is not None
        place = plan.scatter if wanted is None else plan.scatter[wanted]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        return flat.index_select(0, place).flatten(1).unsqueeze(1)

    def _attend(
        self, bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, cache: KVCache | None
    ) -> Tensor:
        """Attention of one bucket -> [n * L, heads, d]."""
        q = _gather(query, bucket.gather)
        if cache is None:
            k, v = _gather(key, bucket.gather), _gather(value, bucket.gather)
        else:
            assert bucket.slots is not None
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
