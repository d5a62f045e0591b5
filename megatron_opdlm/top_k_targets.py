"""Targets in their second form: of the teacher's distribution over a position's next token the k
largest entries with their log-probabilities, in place of its final hidden state.

8 k bytes a position and tensor rank (128 at k = 16; a hidden state of Qwen3-8B in bf16 takes
8,192), and the teacher's output layer runs once a position, however many states and inner epochs
use it. The losses are those of ``divergence.py`` with ``top_k``: the log-probabilities are
normalised over the full vocabulary before anything is cut off. Like it, this file knows no process
group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opdlm.diffusion.denoising import WholeVocabulary
from megatron_opdlm.diffusion.truncation import FLOOR, log_sum, top_k
from megatron_opdlm.diffusion.wide_product import wide_product
from megatron_opdlm.divergence import Divergence, Loss, Terms, compare, student_loss, target


class TopK(NamedTuple):
    """Targets at M positions on one shard of the vocabulary."""

    log_p_Mk: Tensor  # float32 or wider; ``FLOOR`` where this shard has fewer than k of the entries
    column_Mk: Tensor  # int32: of the shard
    log_rest_M: Tensor  # log of what all other entries of all shards weigh together
    finite_M: Tensor  # bool: the teacher's logits were all finite

    def select(self, index: Tensor) -> "TopK":
        """The rows of an index, on its device."""
        return TopK(*(x.index_select(0, index.to(x.device)).to(index.device) for x in self))


def keep_top_k(
    teacher_MH: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence,
    *,
    columns: int,
    reduction: WholeVocabulary,
    chunk_rows: int,
) -> TopK:
    """Hidden states -> targets, for a divergence with ``top_k`` > 0; arguments as in
    ``distillation_loss``. Logits exist for ``chunk_rows`` positions at a time.
    """
    weight = teacher_weight[:columns].t()
    chunks = [
        _keep(wide_product(hidden, weight), divergence, reduction)
        for hidden in teacher_MH.split(chunk_rows)
    ]
    return TopK(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _keep(logits: Tensor, divergence: Divergence, reduction: WholeVocabulary) -> TopK:
    log_p, finite = target(divergence, logits, reduction)
    kept = top_k(log_p, divergence.top_k, reduction)
    log_rest = log_sum(log_p, kept, reduction)
    k = min(divergence.top_k, log_p.shape[-1])
    values, columns = log_p.masked_fill_(~kept, FLOOR).topk(k, sorted=False)
    return TopK(values, columns.int(), log_rest[:, 0], finite)


def top_k_loss(
    student_MH: Tensor,
    student_weight: Tensor,
    kept: TopK,
    row_weight_M: Tensor,
    divergence: Divergence,
    *,
    columns: int,
    reduction: WholeVocabulary,
    chunk_rows: int,
    gradient_sum: Tensor | None = None,
) -> Loss:
    """``distillation_loss`` from kept targets."""

    def compare_rows(log_q: Tensor, rows: slice) -> tuple[Terms, Tensor]:
        log_p = torch.full_like(log_q, FLOOR)
        log_p.scatter_(-1, kept.column_Mk[rows].long(), kept.log_p_Mk[rows].to(log_q.dtype))
        log_rest = kept.log_rest_M[rows, None].to(log_q.dtype)
        terms = compare(divergence, log_p, log_q, reduction, log_rest=log_rest)
        return terms, kept.finite_M[rows]

    how = columns, reduction, chunk_rows, gradient_sum
    return student_loss(student_MH, student_weight, row_weight_M, compare_rows, *how)
