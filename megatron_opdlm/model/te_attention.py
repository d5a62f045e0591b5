"""Backend ``te``: Transformer Engine's DotProductAttention through Megatron's wrapper, in 16 bits.

The teacher's causal mask needs no mask at all: the packed row goes in as it is, with the bounds of
its sequences ("thd"), to FlashAttention or cuDNN. The student's mask is none that those kernels
know, so it is added to the scores as a bias, bucket by bucket: cuDNN's fused kernel where it takes
the bias, else Transformer Engine's unfused one. Written against Transformer Engine 2.9 to 2.11 and
megatron-core 0.16; not run on a GPU yet.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_opdlm.model.dense_attention import Bucketed, bucketed
from megatron_opdlm.model.packed_row import PackedRow

# exp(HIDDEN - anything) is 0 exactly; finite, because kernels subtract maxima.
HIDDEN = -1e30


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where the sequences of a packed row begin and end."""

    cumulative: Tensor  # int32 [S + 1]
    longest: int  # tokens


def bounds(row: PackedRow) -> Bounds:
    """The row's sequences; its tail is one more, since kernels leave the rest unwritten."""
    tail = row.tokens - sum(row.lengths)
    lengths = torch.tensor([0, *row.lengths, *([tail] if tail else [])])
    return Bounds(
        cumulative=lengths.cumsum(0).to(row.device, torch.int32), longest=int(lengths.max())
    )


def biased(row: PackedRow) -> Bucketed:
    """The row's buckets with bfloat16 biases: 0 where visible."""
    plain = bucketed(row, chunked=False)
    buckets = tuple(
        replace(one, mask=torch.where(one.mask, 0.0, HIDDEN).to(torch.bfloat16))
        for one in plain.buckets
    )
    return replace(plain, buckets=buckets)


class TransformerEngineKernel(torch.nn.Module):
    """Two ways into one DotProductAttention. Has no parameters."""

    def __init__(self, **options: Any) -> None:
        """``options``: what Megatron gives to a core attention."""
        super().__init__()
        self.core = TEDotProductAttention(**options)

    def causal(self, query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> Tensor:
        """query [N, heads, d], key and value [N, groups, d] -> [N, heads, d]."""
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds.cumulative,
            cu_seqlens_kv=bounds.cumulative,
            max_seqlen_q=bounds.longest,
            max_seqlen_kv=bounds.longest,
        )
        mask_type = AttnMaskType.padding_causal
        out = self.core(query, key, value, None, mask_type, packed_seq_params=packed)
        return out.reshape(query.shape)

    def biased(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """query [n, L, heads, d], key and value [n, L, groups, d], bias [n, 1, L, L] added to the
        scaled scores -> [n, L, heads, d].
        """
        out = self.core(
            query,
            key,
            value,
            None,
            AttnMaskType.no_mask,
            attention_bias=bias,
            packed_seq_params=PackedSeqParams(qkv_format="bshd"),
        )
        return out.reshape(query.shape)
