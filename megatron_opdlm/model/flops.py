"""Floating-point operations of a forward, counted from what is really computed.

A multiply-add counts as 2 operations: 2 per body parameter and token (of a mixture of experts,
those that the token is sent to, and the router), 4 * heads * head_dim per
layer and attended (query, key) pair, 2 * V * H per row that is projected to the vocabulary.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opdlm.diffusion.masks import TRUNK
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.dense_attention import packed_pairs
from megatron_opdlm.model.packed_row import PackedRow
from megatron_opdlm.model_files.manifest import LowRank
from megatron_opdlm.model_files.shape import ModelShape


def forward_flops(
    shape: ModelShape,
    *,
    tokens: int,
    attended_pairs: float,
    projected_rows: int,
    read_rows: int | None = None,
) -> float:
    """Operations of one forward of the whole model, whatever its layout.

    ``read_rows``: tokens that the last layer carries on after its attention (None: all).
    """
    embedding = shape.vocab_size * shape.hidden
    body = shape.active_parameters - embedding * (1 if shape.tied else 2)
    attention = attention_flops(shape, attended_pairs)
    after_attention = shape.heads * shape.head_dim * shape.hidden + _mlp_parameters(shape)
    unread = 0 if read_rows is None else tokens - read_rows
    body_operations = 2.0 * (body * tokens - after_attention * unread)
    return body_operations + attention + 2.0 * embedding * projected_rows


def mlp_flops(shape: ModelShape, *, tokens: int, read_rows: int | None = None) -> float:
    """Operations of all layers' MLPs, or experts, in a forward."""
    unread = 0 if read_rows is None else tokens - read_rows
    return 2.0 * _mlp_parameters(shape) * (shape.layers * tokens - unread)


def _mlp_parameters(shape: ModelShape) -> int:
    """Parameters of a layer's MLP, or of its router and experts, that work on a token."""
    if shape.experts is None:
        return 3 * shape.hidden * shape.ffn
    experts = shape.experts
    return shape.hidden * (experts.count + 3 * experts.per_token * experts.ffn)


def attention_flops(shape: ModelShape, attended_pairs: float) -> float:
    """Operations of all layers' products of queries, keys and values in a forward."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * attended_pairs


def low_rank_parameters(shape: ModelShape, low_rank: LowRank) -> int:
    """Numbers in A [rank, in] and B [out, rank] of all layers."""
    query, groups = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    sizes = {
        "linear_qkv": shape.hidden + query + 2 * groups,
        "linear_proj": query + shape.hidden,
        "linear_fc1": shape.hidden + 2 * shape.ffn,
        "linear_fc2": shape.ffn + shape.hidden,
    }
    return shape.layers * low_rank.rank * sum(sizes[target] for target in low_rank.targets)


def layer_linear_parameters(shape: ModelShape) -> int:
    """Numbers in the weights of all layers' linears."""
    attention = (2 * shape.heads + 2 * shape.groups) * shape.head_dim
    ffn = shape.experts.count * shape.experts.ffn if shape.experts else shape.ffn
    return shape.layers * shape.hidden * (attention + 3 * ffn)


def attended_pairs(plan: AttentionPlan) -> int:
    """(query, key) pairs that a pass computes against the cache: those that its rows see, or all in
    its buckets, where hidden ones cost as much.
    """
    if plan.rows is not None:
        return plan.rows.block_size * int(plan.rows.visible.sum())
    return sum(bucket.gather.numel() * bucket.mask.shape[-1] for bucket in plan.buckets)


def packed_row_pairs(
    attention: str,
    lengths: Sequence[int],
    block: Tensor | None = None,
    clean: Tensor | None = None,
    branch: Tensor | None = None,
) -> int:
    """(query, key) pairs that a kernel computes for a packed row of sequences of these lengths.

    ``dense`` computes hidden pairs too, of long sequences only those with keys that a chunk of
    queries needs. So does ``te`` on a student's row, where the mask is a bias
    on all scores. Kernels that skip what is hidden count the visible pairs: what they lose in the
    tiles that are partly hidden is not counted as work.

    ``block`` [N] and ``clean`` bool [N] of a student's row; None: causal. ``branch`` [N] of trees.
    """
    host = torch.device("cpu")
    row = PackedRow(
        lengths=tuple(lengths),
        tokens=sum(lengths),
        device=host,
        block=block,
        clean=clean,
        branch=branch,
    )
    if attention == "dense":
        return packed_pairs(row)
    if block is None or clean is None:
        return sum(n * (n + 1) // 2 for n in lengths)
    if attention == "te":
        return packed_pairs(row, chunked=False)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    pairs = 0
    for start, end in itertools.pairwise(starts):
        on = torch.full((end - start,), TRUNK) if branch is None else branch[start:end]
        trunk = on == TRUNK
        branches = int(on.max()) + 1
        for number in range(max(branches, 1)):
            path = trunk | (on == number)
            pairs += _two_stream_pairs(block[start:end][path], clean[start:end][path])
        if branches > 1:  # the trunk's own were counted on every path
            pairs -= (branches - 1) * _two_stream_pairs(
                block[start:end][trunk], clean[start:end][trunk]
            )
    return pairs


def _two_stream_pairs(block: Tensor, clean: Tensor) -> int:
    """Visible pairs of one sequence, whose clean tokens are in order."""
    context, noisy = block[clean].contiguous(), block[~clean].contiguous()
    pairs = int(torch.searchsorted(context, context, right=True).sum())
    pairs += int(torch.searchsorted(context, noisy).sum())  # clean tokens of earlier blocks
    return pairs + int(noisy.unique(return_counts=True)[1].square().sum())
