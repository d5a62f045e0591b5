"""The attention slot: Megatron's ``core_attention`` with our masks, behind three backends.

The plan of a forward says who sees whom; the model says which kernel computes it. ``dense``
(dense_attention.py), ``flex`` (flex_attention.py) and ``te`` (te_attention.py) make of a packed row
what they need, once, and every layer uses it. Decoding against a cache is the same for all of them:
buckets, or rows of one block (decode_attention.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_opdlm.hardware.elementwise import rotate
from megatron_opdlm.model import dense_attention
from megatron_opdlm.model.decode_attention import BlockRows, attend_rows
from megatron_opdlm.model.dense_attention import Bucket, Bucketed, attend_bucketed, bucketed
from megatron_opdlm.model.flex_attention import attend_flex, flex_mask
from megatron_opdlm.model.host_attention import attend_row, host_row
from megatron_opdlm.model.kv_cache import KVCache
from megatron_opdlm.model.packed_row import PackedRow
from megatron_opdlm.model.row_split import RowSplit, by_heads, by_tokens, config_by_heads
from megatron_opdlm.model.te_attention import TransformerEngineKernel, biased, bounds

Made = TypeVar("Made")


@dataclass
class AttentionPlan(PackedSeqParams):
    """Everything that attention needs to know about one forward. ``qkv_format`` is "sbhd" with one
    packed row: ``row`` without a cache, ``rows`` or ``buckets`` with one.
    """

    row: PackedRow | None = None
    # Which of the row's tokens each context rank has; None: this rank has all of them.
    split: RowSplit | None = None
    rows: BlockRows | None = None
    buckets: tuple[Bucket, ...] = ()
    scatter: Tensor | None = (
        None  # [N] place of each packed token among the buckets' flattened rows
    )
    cache: KVCache | None = None
    cache_place: Tensor | None = None  # [N] where new keys and values go
    # [M] packed tokens whose final hidden states are wanted; None: all N of them. The last layer
    # needs no more of the others than their keys and values.
    read: Tensor | None = None
    # Cosines and sines [N, 1, d / 2] by which the tokens' queries and keys are turned; None: they
    # arrive turned.
    rotation: tuple[Tensor, Tensor] | None = None
    _made: dict[Callable[[PackedRow], Any], Any] = field(default_factory=dict)

    def rows_after(self, layer_number: int, config: Any) -> Tensor | None:
        """Packed tokens that go on after this layer's attention, None for all of them.

        Under sequence parallelism every rank keeps its equal share of the rows to the end. Nor do
        we go on with no row at all: not every fused kernel takes that (``LanguageModel`` drops it).
        """
        last = layer_number == config.num_layers and not config.sequence_parallel
        return self.read if last and not self.reads_nothing else None

    @property
    def reads_nothing(self) -> bool:
        """True for a forward that only takes part in the collectives."""
        return self.read is not None and not len(self.read)

    def once(self, make: Callable[[PackedRow], Made]) -> Made:
        """What a kernel makes of the row; the first layer makes it and the others find it."""
        assert self.row is not None
        if make not in self._made:
            self._made[make] = make(self.row)
        return self._made[make]


class MaskedAttention(torch.nn.Module):
    """Grouped-query attention under an ``AttentionPlan``. Has no parameters."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        backend: str = "dense",
        **kwargs: Any,
    ) -> None:
        """``backend``: "dense", "flex" or "te". ``kwargs``: what else Megatron gives."""
        super().__init__()
        self.config, self.layer_number, self.backend = config, layer_number, backend
        scale = kwargs.get("softmax_scale")
        self.scale: float = config.kv_channels**-0.5 if scale is None else scale
        if backend == "te":
            self.te = TransformerEngineKernel(
                config=config_by_heads(config),
                layer_number=layer_number,
                attn_mask_type=attn_mask_type,
                attention_type=attention_type,
                **kwargs,
            )

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
        layer [M, 1, heads * d] where the plan reads M rows only. Under context parallelism N are
        this rank's tokens.
        """
        plan = packed_seq_params
        assert isinstance(plan, AttentionPlan), (
            "our attention is driven by an AttentionPlan in packed_seq_params"
        )
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.rotation is not None:
            query, key = (rotate(x, *plan.rotation) for x in (query, key))
        wanted = plan.rows_after(self.layer_number, self.config)
        if plan.split is not None:
            own_heads = by_heads(query, key, value, plan.split)
            attended = self._packed(*own_heads, plan, None)
            flat = _chosen(by_tokens(attended, plan.split), wanted)
        elif plan.cache is None:
            flat = self._packed(query, key, value, plan, wanted)
        else:
            flat = self._cached(query, key, value, plan, plan.cache, wanted)
        return flat.flatten(1).unsqueeze(1)

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, read: Tensor | None
    ) -> Tensor:
        """[N, heads, d] of the plan's row, or its rows ``read``."""
        assert plan.row is not None
        if self.backend == "flex":
            return _chosen(attend_flex(query, key, value, plan.once(flex_mask), self.scale), read)
        if self.backend == "te" and plan.row.causal:
            return _chosen(self.te.causal(query, key, value, plan.once(bounds)), read)
        if self.backend == "te":
            made = plan.once(biased)
            return attend_bucketed(query, key, value, made, self.te.biased, read=read)
        if query.device.type == "cpu":
            return _chosen(attend_row(query, key, value, plan.once(host_row), self.scale), read)
        return attend_bucketed(query, key, value, plan.once(bucketed), self._dense, read=read)

    def _cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        cache: KVCache,
        read: Tensor | None,
    ) -> Tensor:
        """The same against a cache, which first gets the new keys and values."""
        assert plan.cache_place is not None
        cache.write(self.layer_number, plan.cache_place, key, value)
        if plan.rows is not None:
            keys, values = cache.layer(self.layer_number)
            return _chosen(attend_rows(query, keys, values, plan.rows, self.scale), read)

        def cached(bucket: Bucket) -> tuple[Tensor, Tensor]:
            assert bucket.slots is not None
            return cache.read(self.layer_number, bucket.slots, bucket.mask.shape[-1])

        assert plan.scatter is not None
        made = Bucketed(buckets=plan.buckets, scatter=plan.scatter)
        return attend_bucketed(query, key, value, made, self._dense, read=read, cached=cached)

    @property
    def _dense(self) -> dense_attention.Kernel:
        return partial(dense_attention.attend, scale=self.scale)


def _chosen(flat: Tensor, rows: Tensor | None) -> Tensor:
    return flat if rows is None else flat.index_select(0, rows)
