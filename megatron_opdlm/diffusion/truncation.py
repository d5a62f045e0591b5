"""Truncated distributions over a vocabulary that may be split over tensor ranks: which entries are
kept, and what the others weigh together.

Plain torch; the shards' reductions are passed in and nothing of the vocabulary's size is gathered.
The log-probability of an entry that is taken out is ``FLOOR``, not -inf: its probability is exactly
0 in every float type, and 0 * FLOOR = 0, so no formula needs a special case that could hide a NaN.
"""

import torch
from torch import Tensor

from megatron_opdlm.diffusion.denoising import (
    WholeVocabulary,
    best_candidates,
    heaviest,
    leading,
)

FLOOR = -1e30


def row_max(x: Tensor) -> Tensor:
    """Largest entry of each row [m, 1]; the lowest finite number in a shard without columns."""
    if x.shape[-1] == 0:
        return x.new_full((len(x), 1), torch.finfo(x.dtype).min)
    return x.amax(-1, keepdim=True)


def log_sum(log_x: Tensor, left_out: Tensor, reduction: WholeVocabulary) -> Tensor:
    """log of the sum of exp(log_x) over all columns but those ``left_out`` -> [m, 1]; ``FLOOR``
    where nothing is left.
    """
    left = log_x.masked_fill(left_out, FLOOR)
    top = reduction.max(row_max(left))
    share = left.sub_(top).exp_().masked_fill_(left_out, 0)
    total = reduction.sum(share.sum(-1, keepdim=True))
    return (top + total.log()).clamp_min(FLOOR)


def nucleus(log_p: Tensor, top_p: float, reduction: WholeVocabulary) -> Tensor:
    """The smallest set of likeliest entries that holds ``top_p`` of the probability, renormalised
    (Holtzman et al., arXiv 1904.09751); in place. Entries count in float32, ties go to the
    lowest id.
    """
    p = log_p.exp().float()
    need = top_p * reduction.sum(p.sum(-1, dtype=torch.float64))
    left_out = ~heaviest(p, need, reduction)
    return log_p.sub_(log_sum(log_p, left_out, reduction)).masked_fill_(left_out, FLOOR)


def top_k(log_p: Tensor, k: int, reduction: WholeVocabulary) -> Tensor:
    """bool [m, columns]: the k largest entries over all shards, ties to the lowest id, without
    those at ``FLOOR``.
    """
    columns = log_p.shape[-1]
    most = int(reduction.max(torch.tensor([columns], device=log_p.device)))
    candidates = best_candidates(log_p, min(k, most), k, reduction)
    return leading(log_p, candidates, candidates.shape[-1], reduction) & (log_p > FLOOR)
