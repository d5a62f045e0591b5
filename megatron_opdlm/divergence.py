"""Divergences between teacher and student distributions: value and gradient in one pass over row
chunks.

In words: p is the teacher's distribution over the next token, q the student's over the same
position. Forward KL is the extra surprise of someone who expects q and sees p. Only hidden states
come in; logits exist for one chunk of rows at a time, so memory is O(chunk x V) whatever the number
of positions. The reduction over a vocabulary that is split over tensor ranks is passed in; this
file knows no process group.

Every loss is written as its derivative g_v with respect to log q_v. With q = softmax(z) the
gradient with respect to the logits is dL/dz_j = g_j - q_j * sum_v g_v.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Reduction(Protocol):
    """Reductions over the vocabulary's shards; identities where one process holds all of it."""

    start: int

    def max(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence; ``kind`` is one of ``KINDS``."""

    kind: str = "forward_kl"
    reverse_weight: float = 0.0  # mixed: (1 - w) forward + w reverse
    jsd_alpha: float = 0.5  # a in m = a p + (1 - a) q


class Terms(NamedTuple):
    """Per vocabulary entry: the summands of the value, and g_v; both [M, columns]."""

    value: Tensor
    slope: Tensor


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    """probability * factor with 0 * inf = 0, the limit of x log x."""
    return torch.where(probability > 0, probability * factor, 0.0)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(p || q) = sum_v p (log p - log q)   (OPDLM, arXiv 2606.06712)."""
    p = log_p.exp()
    return Terms(_times(p, log_p - log_q), -p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(q || p) = sum_v q (log q - log p); the constant part of g_v cancels in the logits'
    gradient.
    """
    q = log_q.exp()
    value = _times(q, log_q - log_p)
    return Terms(value, value)


def jensen_shannon(log_p: Tensor, log_q: Tensor, alpha: float) -> Terms:
    """a KL(p || m) + (1 - a) KL(q || m), m = a p + (1 - a) q; dL/dq = (1 - a) (log q - log m)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.log(alpha * p + (1 - alpha) * q)
    to_q = (1 - alpha) * _times(q, log_q - log_m)
    return Terms(alpha * _times(p, log_p - log_m) + to_q, to_q)


def terms(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Terms:
    """The summands and slopes of a divergence between two distributions."""
    if divergence.kind == "forward_kl":
        return forward_kl(log_p, log_q)
    if divergence.kind == "reverse_kl":
        return reverse_kl(log_p, log_q)
    if divergence.kind == "jsd":
        return jensen_shannon(log_p, log_q, divergence.jsd_alpha)
    if divergence.kind == "mixed":
        weight = divergence.reverse_weight
        forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
        value, slope = (
            (1 - weight) * f + weight * r for f, r in zip(forward, reverse, strict=True)
        )
        return Terms(value, slope)
    raise ValueError(f"divergence kind {divergence.kind!r} is unknown")


def log_softmax(logits: Tensor, reduction: Reduction) -> Tensor:
    """log softmax over a split vocabulary; columns at -inf (layout padding) stay at -inf."""
    top = reduction.max(logits.amax(-1, keepdim=True))
    total = reduction.sum(torch.exp(logits - top).sum(-1, keepdim=True))
    return logits - top - total.log()


def negative_log_likelihood(log_q: Tensor, label_M: Tensor, start: int) -> Terms:
    """-log q(label): the label's column may lie in another shard."""
    columns = torch.arange(log_q.shape[-1], device=log_q.device) + start
    hit = columns == label_M[:, None]
    return Terms(torch.where(hit, -log_q, 0.0), -hit.to(log_q.dtype))


Project = Callable[
    [Tensor, Tensor], Tensor
]  # (hidden [m, H], weight [columns, H]) -> logits [m, columns], padding at -inf


class _ChunkedDivergence(torch.autograd.Function):
    """Weighted sum of position values; the gradients are written during the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_MH: Tensor,
        student_weight: Tensor,
        row_weight_M: Tensor,
        values: Callable[[Tensor, slice], Terms],
        project: Project,
        reduction: Reduction,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.promote_types(student_MH.dtype, torch.float32)
        value_M = torch.zeros(len(student_MH), dtype=accumulate, device=student_MH.device)
        grad_hidden = torch.zeros_like(student_MH)
        grad_weight = (
            torch.zeros_like(student_weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(student_MH), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden = student_MH[rows]
            log_q = log_softmax(project(hidden, student_weight).to(accumulate), reduction)
            summand, slope = values(log_q, rows)
            value_M[rows] = reduction.sum(summand.sum(-1))
            grad_logits = slope - log_q.exp() * reduction.sum(slope.sum(-1, keepdim=True))
            grad_logits = (grad_logits * row_weight_M[rows, None]).to(student_MH.dtype)
            grad_hidden[rows] = grad_logits @ student_weight
            if grad_weight is not None:
                grad_weight += (grad_logits.t() @ hidden).to(accumulate)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = student_weight.dtype
        ctx.mark_non_differentiable(value_M)
        return (value_M * row_weight_M).sum(), value_M

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the hidden states is this shard's part: whoever split the vocabulary sums
        it over the shards.
        """
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype)
        )
        return (
            grad_hidden * grad_total.to(grad_hidden.dtype),
            grad_weight,
            None,
            None,
            None,
            None,
            None,
        )


def distillation_loss(
    student_MH: Tensor,
    student_weight: Tensor,
    teacher_MH: Tensor,
    teacher_weight: Tensor,
    row_weight_M: Tensor,
    divergence: Divergence,
    project: Project,
    reduction: Reduction,
    chunk_rows: int = 256,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the divergences at M positions, differentiable in the student's arguments.

    Args:
        student_MH, teacher_MH: hidden states that predict the M positions; their widths may differ.
        student_weight, teacher_weight: output projections [columns, H] of this shard.
        row_weight_M: weight of each position, 1 / (counted positions of its sequence).
        project: hidden states and weight -> logits with the layout's padding at -inf.

    Returns:
        (sum of row_weight * value, value of each position [M] in nats). The caller divides by the
        number of sequences.
    """
    accumulate = torch.promote_types(student_MH.dtype, torch.float32)

    def values(log_q: Tensor, rows: slice) -> Terms:
        log_p = log_softmax(project(teacher_MH[rows], teacher_weight).to(accumulate), reduction)
        return terms(divergence, log_p, log_q)

    return _ChunkedDivergence.apply(
        student_MH, student_weight, row_weight_M, values, project, reduction, chunk_rows
    )


def likelihood_loss(
    student_MH: Tensor,
    student_weight: Tensor,
    label_M: Tensor,
    row_weight_M: Tensor,
    project: Project,
    reduction: Reduction,
    chunk_rows: int = 256,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of -log q(label) at M positions; arguments and result as in
    ``distillation_loss``.
    """

    def values(log_q: Tensor, rows: slice) -> Terms:
        return negative_log_likelihood(log_q, label_M[rows], reduction.start)

    return _ChunkedDivergence.apply(
        student_MH, student_weight, row_weight_M, values, project, reduction, chunk_rows
    )
