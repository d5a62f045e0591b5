"""Truncated distributions over a vocabulary that may be split over tensor ranks: which entries are
kept, and what the others weigh together.

Plain torch; the shards' reductions are passed in and nothing of the vocabulary's size is gathered.
The log-probability of an entry that is taken out is ``FLOOR``, not -inf: its probability is exactly
0 in every float type, and 0 * FLOOR = 0, so no formula needs a special case that could hide a NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.denoising import WholeVocabulary, largest

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
    (Holtzman et al., arXiv 1904.09751); in place. Entries are compared in float32, ties go to the
    lowest id.
    """
    p = log_p.exp()
    need = top_p * reduction.sum(p.double().sum(-1))
    left_out = ~largest(p.float(), p, need, reduction)
    return log_p.sub_(log_sum(log_p, left_out, reduction)).masked_fill_(left_out, FLOOR)


def top_k(log_p: Tensor, k: int, reduction: WholeVocabulary) -> Tensor:
    """bool [m, columns]: the k largest entries over all shards, ties to the lowest id, without
    those at ``FLOOR``.

    The k-th largest value is found among the k largest of every shard: ranks x k numbers a row are
    gathered.
    """
    columns = log_p.shape[-1]
    width = int(reduction.max(torch.tensor([columns], device=log_p.device)))
    own = log_p.topk(min(k, columns), sorted=False).values
    own = F.pad(own, (0, min(k, width) - own.shape[-1]), value=-torch.inf)
    candidates = reduction.gather_rows(own)
    least = candidates.topk(min(k, candidates.shape[-1])).values[:, -1:].clamp_min(FLOOR)
    above = log_p > least
    tied = (log_p == least) & (log_p > FLOOR)
    missing = k - reduction.sum(above.sum(-1))
    lower_shards, _ = reduction.before(tied.sum(-1))
    order = lower_shards[:, None] + tied.cumsum(-1, dtype=torch.int32)
    return above | (tied & (order <= missing[:, None]))
