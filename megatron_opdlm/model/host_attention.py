"""Attention of a packed row on a CPU: all buckets and chunks as one node of the autograd graph.

Calls PyTorch's kernel for CPUs directly, forward and backward. So nothing is kept for the backward
pass but the row's queries, keys, values and result, gradients are added where they belong instead
of in rows of zeros for every bucket, no head's keys are repeated, and masks become what the kernel
adds to its scores once a forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.dense_attention import bucketed, runs_of
from megatron_opdlm.model.packed_row import PackedRow

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """Short sequences that are attended together."""

    gather: Tensor  # [n, L] packed tokens, some twice: padding
    own: Tensor  # [r] places of the flattened ``gather`` that are no padding
    to: Tensor  # [r] packed tokens of those
    bias: Tensor  # [n, 1, L, L] added to the scores


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Queries of a long sequence; see ``dense_attention.Chunk``."""

    queries: slice
    keys: tuple[slice, ...]
    bias: Tensor  # [1, 1, L, K]


@dataclass(frozen=True, kw_only=True)
class HostRow:
    """What is made of a packed row once a forward."""

    buckets: tuple[_Bucket, ...]
    chunks: tuple[_Chunk, ...]
    has_tail: bool


def host_row(row: PackedRow) -> HostRow:
    """The row's buckets and chunks."""
    made, buckets, base = bucketed(row), [], 0
    for bucket in made.buckets:
        flat = bucket.gather.flatten()
        own = torch.nonzero(made.scatter[flat] == base + torch.arange(len(flat))).flatten()
        base += len(flat)
        buckets.append(
            _Bucket(gather=bucket.gather, own=own, to=flat[own], bias=_added(bucket.mask))
        )
    return HostRow(
        buckets=tuple(buckets),
        chunks=tuple(
            _Chunk(queries=chunk.queries, keys=chunk.keys, bias=_added(chunk.mask))
            for chunk in made.chunks
        ),
        has_tail=sum(row.lengths) < row.tokens,
    )


def _added(mask: Tensor) -> Tensor:
    """A mask (bool, True = may attend) as float32 numbers that are added to scores."""
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


def attend_row(query: Tensor, key: Tensor, value: Tensor, row: HostRow, scale: float) -> Tensor:
    """query [N, heads, d], key and value [N, groups, d] -> [N, heads, d]; 0 in the row's tail."""
    return _Attention.apply(query, key, value, row, scale)


class _Attention(torch.autograd.Function):
    """Softmax(q k^T * scale + bias) v, bucket by bucket and chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: HostRow, scale: float
    ) -> Tensor:
        value = value.contiguous()  # as a view it would keep the whole joined product
        q, k, v = _widened(query, key, value)
        out, sums = torch.empty(q.shape, dtype=q.dtype), []
        if row.has_tail:
            out.zero_()
        for bucket in row.buckets:
            own_q, own_k, own_v = (_gathered(x, bucket.gather) for x in (q, k, v))
            made, log_sum = _forward(own_q, own_k, own_v, bucket.bias, scale)
            out.index_copy_(0, bucket.to, made.transpose(1, 2).flatten(0, 1)[bucket.own])
            sums.append(log_sum)
        for chunk in row.chunks:
            own_q, own_k, own_v = _of_chunk(q, k, v, chunk)
            made, log_sum = _forward(own_q, own_k, own_v, chunk.bias, scale)
            out[chunk.queries] = made[0].transpose(0, 1)
            sums.append(log_sum)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        row, scale, dtype = ctx.row, ctx.scale, query.dtype
        q, k, v, out, grad = _widened(query, key, value, out, grads[0])
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if row.has_tail:
            grad_q.zero_()
        for bucket, log_sum in zip(row.buckets, sums, strict=False):
            given = grad.new_zeros(bucket.gather.numel(), *grad.shape[1:])
            given.index_copy_(0, bucket.own, grad[bucket.to])  # padding gives nothing
            given = given.unflatten(0, bucket.gather.shape).transpose(1, 2)
            own_q, own_k, own_v, result = (_gathered(x, bucket.gather) for x in (q, k, v, out))
            inputs = given, own_q, own_k, own_v, result
            made = _backward(*inputs, log_sum, bucket.bias, scale)
            for whole, part in zip((grad_q, grad_k, grad_v), made, strict=True):
                part = part.transpose(1, 2).flatten(0, 1)
                whole.index_copy_(0, bucket.to, part[bucket.own])
        for chunk, log_sum in zip(row.chunks, sums[len(row.buckets) :], strict=True):
            given, result = (x[chunk.queries].transpose(0, 1)[None] for x in (grad, out))
            own_q, own_k, own_v = _of_chunk(q, k, v, chunk)
            inputs = given, own_q, own_k, own_v, result
            part_q, *parts = _backward(*inputs, log_sum, chunk.bias, scale)
            grad_q[chunk.queries] = part_q[0].transpose(0, 1)
            for whole, part in zip((grad_k, grad_v), parts, strict=True):
                _add_runs(whole, chunk.keys, part[0].transpose(0, 1))
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each row's sum."""
    return _kernel(q, k, v, attn_mask=_fitting(bias, q), scale=scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    given, bias = (grad, q, k, v, out, log_sum), _fitting(bias, q)
    return _kernel_backward(*given, 0.0, False, attn_mask=bias, scale=scale)


def _fitting(bias: Tensor, q: Tensor) -> Tensor:
    """In float64 the kernel misreads a float32 bias."""
    return bias.to(torch.promote_types(bias.dtype, q.dtype))


def _widened(query: Tensor, *others: Tensor) -> list[Tensor]:
    wide = select_hardware().attention_dtype(query.dtype)
    return [x.to(wide) for x in (query, *others)]


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [N, heads, d] at index [n, L] -> [n, heads, L, d]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _of_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, heads or groups, L or K, d]."""
    k, v = (runs_of(x, chunk.keys).transpose(0, 1)[None] for x in (k, v))
    return q[chunk.queries].transpose(0, 1)[None], k, v


def _add_runs(whole: Tensor, runs: tuple[slice, ...], part: Tensor) -> None:
    """Add the rows of ``part`` to runs of rows."""
    first = 0
    for run in runs:
        count = run.stop - run.start
        whole[run] += part[first : first + count]
        first += count
