"""Divergences between teacher and student distributions: value and gradient in one pass over row
chunks.

In words: p is the teacher's distribution over the next token, q the student's over the same
position. Forward KL is the extra surprise of someone who expects q and sees p. Only hidden states
come in; logits exist for one chunk of rows at a time, so memory is O(chunk x V) whatever the number
of positions. The reductions over a vocabulary that is split over tensor ranks are passed in; this
file knows no process group.

Every loss is written as its derivative g_v with respect to log q_v. With q = softmax(z) the
gradient with respect to the logits is dL/dz_j = g_j - q_j * sum_v g_v.

No logarithm in here is infinite unless a model's logits are (see ``truncation.FLOOR``), so nothing
is masked that could hide a fault; rows with a non-finite logit are reported as such.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_opdlm.diffusion.denoising import WholeVocabulary
from megatron_opdlm.diffusion.truncation import FLOOR, log_sum, nucleus, row_max, top_k
from megatron_opdlm.diffusion.wide_product import wide_product

TEACHER_FAULT, STUDENT_FAULT = 1, 2  # bits of ``Loss.fault_M``
PIECE = 2**20  # logits that a CPU compares at a time: they stay in its cache


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence, over which part of the vocabulary, from which target distribution."""

    kind: str = "forward_kl"
    reverse_weight: float = 0.0  # mixed: (1 - w) forward + w reverse
    jsd_alpha: float = 0.5  # a in m = a p + (1 - a) q
    top_k: int = 0  # sum over the teacher's k largest entries only; 0: all
    # What becomes of the other entries. drop: they are left out of the sum, nobody is renormalised
    # (OPDLM's reference; may be negative, least at q = p / sum of p over the k entries).
    # renormalise: teacher and student over the k entries alone (ModelOpt's loss). bucket: they are
    # one more event, with the rest of both masses.
    top_k_tail: str = "drop"
    teacher_temperature: float = 1.0
    teacher_top_p: float = 1.0  # nucleus of the tempered distribution, renormalised


class Loss(NamedTuple):
    """The losses of M positions."""

    total: Tensor  # weighted sum, differentiable; the caller divides by the number of sequences
    value_M: Tensor  # each position's value, nats
    fault_M: Tensor  # uint8 bits: whose logits at the position are not all finite


class Terms(NamedTuple):
    """Per event: the summands of the value, and g_v; both [M, events]."""

    value: Tensor
    slope: Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(p || q) = sum_v p (log p - log q)   (OPDLM, arXiv 2606.06712). Overwrites ``log_p``."""
    p = log_p.exp()
    return Terms(log_p.sub_(log_q).mul_(p), p.neg_())


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(q || p) = sum_v q (log q - log p); the sum may run over a part of the vocabulary."""
    q = log_q.exp()
    value = (log_q - log_p).mul_(q)
    return Terms(value, q.add_(value))


def jensen_shannon(log_p: Tensor, log_q: Tensor, alpha: float) -> Terms:
    """a KL(p || m) + (1 - a) KL(q || m), m = a p + (1 - a) q; dL/dq = (1 - a) (log q - log m)."""
    p, q = log_p.exp(), log_q.exp()
    m = (alpha * p).add_(q, alpha=1 - alpha)
    log_m = m.clamp_min_(torch.finfo(m.dtype).tiny).log_()  # below it, p and q are 0, too
    to_q = (log_q - log_m).mul_(q).mul_(1 - alpha)
    return Terms((log_p - log_m).mul_(p).mul_(alpha).add_(to_q), to_q)


def terms(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Terms:
    """The summands and slopes of a divergence between two distributions; overwrites ``log_p``."""
    if divergence.kind == "forward_kl":
        return forward_kl(log_p, log_q)
    if divergence.kind == "reverse_kl":
        return reverse_kl(log_p, log_q)
    if divergence.kind == "jsd":
        return jensen_shannon(log_p, log_q, divergence.jsd_alpha)
    if divergence.kind == "mixed":
        weight = divergence.reverse_weight
        reverse, forward = reverse_kl(log_p, log_q), forward_kl(log_p, log_q)
        value, slope = (
            f.mul_(1 - weight).add_(r, alpha=weight) for f, r in zip(forward, reverse, strict=True)
        )
        return Terms(value, slope)
    raise ValueError(f"divergence kind {divergence.kind!r} is unknown")


def compare(
    divergence: Divergence,
    log_p: Tensor,
    log_q: Tensor,
    reduction: WholeVocabulary,
    log_rest: Tensor | None = None,
) -> Terms:
    """Value [M, 1] over all shards and slopes [M, columns]. Overwrites both log-probabilities;
    ``log_q`` ends as that of the distribution the slopes belong to. ``log_rest`` [M, 1]: what the
    teacher's entries beyond the top k weigh, where ``log_p`` does not hold them.
    """
    if not divergence.top_k:
        value, slope = terms(divergence, log_p, log_q)
        return Terms(reduction.sum(value.sum(-1, keepdim=True)), slope)
    rest = ~top_k(log_p, divergence.top_k, reduction)
    if divergence.top_k_tail == "bucket":
        return _compare_with_bucket(divergence, log_p, log_q, rest, log_rest, reduction)
    if divergence.top_k_tail == "renormalise":
        for log_x in (log_p, log_q):
            log_x.sub_(log_sum(log_x, rest, reduction)).masked_fill_(rest, FLOOR)
    value, slope = (x.masked_fill_(rest, 0) for x in terms(divergence, log_p, log_q))
    return Terms(reduction.sum(value.sum(-1, keepdim=True)), slope)


def _compare_with_bucket(
    divergence: Divergence,
    log_p: Tensor,
    log_q: Tensor,
    rest: Tensor,
    log_rest: Tensor | None,
    reduction: WholeVocabulary,
) -> Terms:
    """The kept entries and one event t for the rest: dL/dlog q_v = g_t q_v / q_t outside them."""
    kept = ~rest
    log_p_t = log_sum(log_p, kept, reduction) if log_rest is None else log_rest.clone()
    log_q_t = log_sum(log_q, kept, reduction)
    bucket = terms(divergence, log_p_t, log_q_t)  # the same on every shard
    value, slope = (x.masked_fill_(rest, 0) for x in terms(divergence, log_p, log_q))
    share = (log_q - log_q_t).exp_().masked_fill_(kept, 0)
    total = reduction.sum(value.sum(-1, keepdim=True)) + bucket.value
    return Terms(total, slope.add_(share.mul_(bucket.slope)))


def log_softmax(logits: Tensor, reduction: WholeVocabulary) -> tuple[Tensor, Tensor]:
    """In place, over a split vocabulary; and for each row [M] whether all its logits, of every
    shard, are finite.
    """
    finite = torch.isfinite(logits.sum(-1, keepdim=True))
    # An infinite maximum marks the row on every shard; a maximum of NaNs may swallow them.
    top = reduction.max(torch.where(finite, row_max(logits), torch.inf))
    logits.sub_(top)
    total = reduction.sum(logits.exp().sum(-1, keepdim=True))
    return logits.sub_(total.log()), torch.isfinite(top[:, 0])


def target(
    divergence: Divergence, logits: Tensor, reduction: WholeVocabulary
) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities after reshaping, in place, and which rows are finite."""
    if divergence.teacher_temperature != 1:
        logits.div_(divergence.teacher_temperature)
    log_p, finite = log_softmax(logits, reduction)
    if divergence.teacher_top_p < 1:
        nucleus(log_p, divergence.teacher_top_p, reduction)
    return log_p, finite


def negative_log_likelihood(log_q: Tensor, label_M: Tensor, reduction: WholeVocabulary) -> Terms:
    """-log q(label) [M, 1] and its slopes: the label's column may lie in another shard."""
    column = (label_M - reduction.start)[:, None]
    mine = (column >= 0) & (column < log_q.shape[-1])
    column = torch.where(mine, column, 0)
    slope = torch.zeros_like(log_q).scatter_(-1, column, -mine.to(log_q.dtype))
    value = torch.where(mine, -log_q.gather(-1, column), 0.0)
    return Terms(reduction.sum(value), slope)


# log q of some rows (may be overwritten as ``compare`` does), which rows -> value and slope of
# their positions, and which of them have a finite teacher.
Compare = Callable[[Tensor, slice], tuple[Terms, Tensor]]


class Projection:
    """Logits of M positions in order, a chunk of rows at a time, each in the memory of the one
    before: to take fresh memory costs a CPU a third of the product.
    """

    def __init__(self, hidden_MH: Tensor, weight: Tensor, chunk_rows: int) -> None:
        """``weight``: of the columns that are tokens."""
        self.hidden_MH, self.weight, self.chunk_rows = hidden_MH, weight.t(), chunk_rows
        self.memory: Tensor | None = None
        self.start = self.stop = 0  # of the chunk

    def __call__(self, rows: slice) -> Tensor:
        """Logits of rows that lie in one chunk: the one at hand, or the next."""
        if rows.start >= self.stop:
            self.start = self.stop
            self.stop = min(self.start + self.chunk_rows, len(self.hidden_MH))
            self._project(self.hidden_MH[self.start : self.stop])
        assert self.memory is not None and rows.stop <= self.stop
        return self.memory[rows.start - self.start : rows.stop - self.start]

    def _project(self, hidden: Tensor) -> None:
        if self.memory is None:
            self.memory = wide_product(hidden, self.weight)
        elif self.memory.dtype == hidden.dtype:
            torch.mm(hidden, self.weight, out=self.memory[: len(hidden)])
        else:
            self.memory[: len(hidden)] = wide_product(hidden, self.weight)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


class _ChunkedLoss(torch.autograd.Function):
    """Weighted sum of position values; the gradients are written during the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_MH: Tensor,
        student_weight: Tensor,
        row_weight_M: Tensor,
        compare_rows: Compare,
        columns: int,
        reduction: WholeVocabulary,
        chunk_rows: int,
        gradient_sum: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        accumulate = torch.promote_types(student_MH.dtype, torch.float32)
        weight = student_weight[:columns]
        value_M = torch.zeros(len(student_MH), dtype=accumulate, device=student_MH.device)
        fault_M = torch.zeros_like(value_M, dtype=torch.uint8)
        grad_hidden = torch.zeros_like(student_MH)
        grad_weight = gradient_sum
        if gradient_sum is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(student_weight, dtype=accumulate)
        project = Projection(student_MH, weight, chunk_rows)
        # As many on every shard, whose reductions have to meet.
        piece_rows = PIECE // len(student_weight) or 1 if weight.is_cpu else chunk_rows
        for chunk in _slices(0, len(student_MH), chunk_rows):
            logits = project(chunk)
            for rows in _slices(chunk.start, chunk.stop, piece_rows):
                value_M[rows], fault_M[rows] = _to_gradient(
                    project(rows),
                    row_weight_M[rows],
                    lambda log_q, rows=rows: compare_rows(log_q, rows),
                    reduction,
                )
            grad_logits = logits.to(student_MH.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight[:columns], grad_logits.t(), student_MH[chunk])
            del grad_logits  # before the next chunk's logits come
        ctx.save_for_backward(grad_hidden, grad_weight if gradient_sum is None else None)
        ctx.weight_dtype, ctx.is_summed = student_weight.dtype, gradient_sum is not None
        ctx.mark_non_differentiable(value_M, fault_M)
        return (value_M * row_weight_M).sum(), value_M, fault_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the hidden states is this shard's part: whoever split the vocabulary sums
        it over the shards. In place: a second backward is refused by autograd.
        """
        (grad_hidden, grad_weight), grad_total = ctx.saved_tensors, grads[0]
        if ctx.is_summed:
            torch._assert_async(grad_total == 1)  # what was added to the sum cannot be scaled
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad_total), grad_weight, *(None,) * 6


def _to_gradient(
    logits: Tensor,
    row_weight: Tensor,
    compare_rows: Callable[[Tensor], tuple[Terms, Tensor]],
    reduction: WholeVocabulary,
) -> tuple[Tensor, Tensor]:
    """Student's logits -> values and faults; the logits become their own weighted gradient. At most
    three arrays of their size exist at a time.
    """
    log_q, student_finite = log_softmax(logits, reduction)
    (value, slope), teacher_finite = compare_rows(log_q)
    fault = STUDENT_FAULT * ~student_finite + TEACHER_FAULT * ~teacher_finite
    slope_sum = reduction.sum(slope.sum(-1, keepdim=True))
    log_q.exp_().mul_(-slope_sum).add_(slope).mul_(row_weight[:, None])
    return value[:, 0], fault


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a copy of the product where the types agree."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += wide_product(a, b)


def student_loss(
    student_MH: Tensor,
    student_weight: Tensor,
    row_weight_M: Tensor,
    compare_rows: Compare,
    columns: int,
    reduction: WholeVocabulary,
    chunk_rows: int,
    gradient_sum: Tensor | None = None,
) -> Loss:
    """Weighted sum of what ``compare_rows`` finds, differentiable in the student's arguments, which
    are those of ``distillation_loss``.
    """
    arguments = row_weight_M, compare_rows, columns, reduction, chunk_rows, gradient_sum
    return Loss(*_ChunkedLoss.apply(student_MH, student_weight, *arguments))


def distillation_loss(
    student_MH: Tensor,
    student_weight: Tensor,
    teacher_MH: Tensor,
    teacher_weight: Tensor,
    row_weight_M: Tensor,
    divergence: Divergence,
    *,
    columns: int,
    reduction: WholeVocabulary,
    chunk_rows: int,
    gradient_sum: Tensor | None = None,
) -> Loss:
    """Weighted sum of the divergences at M positions, differentiable in the student's arguments.

    Args:
        student_MH, teacher_MH: hidden states that predict the M positions; their widths may differ.
        student_weight, teacher_weight: output projections of this shard, a row per token.
        row_weight_M: weight of each position, 1 / (counted positions of its sequence).
        columns: the weights' rows that are tokens; those after them pad a parallel layout.
        chunk_rows: positions whose logits exist at once.
        gradient_sum: where the gradient of ``student_weight`` is added at once, as if the total's
            own gradient were 1, which it then has to be; None: it is returned like any other.
    """

    project = Projection(teacher_MH, teacher_weight[:columns], chunk_rows)

    def compare_rows(log_q: Tensor, rows: slice) -> tuple[Terms, Tensor]:
        log_p, finite = target(divergence, project(rows), reduction)
        return compare(divergence, log_p, log_q, reduction), finite

    how = columns, reduction, chunk_rows, gradient_sum
    return student_loss(student_MH, student_weight, row_weight_M, compare_rows, *how)


def likelihood_loss(
    student_MH: Tensor,
    student_weight: Tensor,
    label_M: Tensor,
    row_weight_M: Tensor,
    *,
    columns: int,
    reduction: WholeVocabulary,
    chunk_rows: int,
    gradient_sum: Tensor | None = None,
) -> Loss:
    """Weighted sum of -log q(label) at M positions; arguments as in ``distillation_loss``."""

    def compare_rows(log_q: Tensor, rows: slice) -> tuple[Terms, Tensor]:
        no_teacher = torch.ones(len(log_q), dtype=torch.bool, device=log_q.device)
        return negative_log_likelihood(log_q, label_M[rows], reduction), no_teacher

    how = columns, reduction, chunk_rows, gradient_sum
    return student_loss(student_MH, student_weight, row_weight_M, compare_rows, *how)
