"""Decoding rules of block diffusion: draw a token at every position, then choose which positions to
commit.

Plain torch and self-contained: exported models carry this very file. Vectorised over positions and
sequences; a vocabulary that is split over tensor-parallel ranks is reduced through the ``shard``
argument and its logits are never gathered.

Definitions (they follow DESIGN 4b):
- confidence of a position = probability of its drawn token under the unshaped softmax;
- temperature, top-k and top-p, in this order, shape the distribution that is drawn from;
  temperature 0 is the arg-max;
- ties go to the lowest token id, then to the lowest position.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REMASKING = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded")


class WholeVocabulary:
    """The trivial shard: this process holds every logit. A tensor-parallel shard offers the same
    methods.
    """

    start = 0  # global id of the first local column

    def max(self, x: Tensor) -> Tensor:
        """Element-wise maximum over the shards."""
        return x

    def min(self, x: Tensor) -> Tensor:
        """Element-wise minimum over the shards."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the shards."""
        return x

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(sum over the shards with lower ids, sum over all shards), the same values on every
        shard.
        """
        return torch.zeros_like(x), x

    def gather_rows(self, x: Tensor) -> Tensor:
        """x [M, k] of all shards side by side, lower ids first."""
        return x


WHOLE = WholeVocabulary()


class Draw(NamedTuple):
    """One drawn token a row."""

    token: Tensor  # [M] int64 global ids
    confidence: Tensor  # [M] float64 probability of the token under the unshaped softmax
    entropy: Tensor  # [M] float64 entropy of the unshaped softmax, nats; 0 if not asked for


def draw(
    logits_MV: Tensor,
    uniform_M: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    with_entropy: bool = True,
    shard: WholeVocabulary = WHOLE,
    numbers_at_once: int | None = None,
) -> Draw:
    """Draw one token a row by inverting the cumulative distribution at ``uniform_M`` (float64 in
    [0, 1)).

    ``logits_MV`` are this shard's columns, forbidden ids already at -inf. Sums are taken in
    float64. ``with_entropy=False`` leaves the entropies 0: only one remasking rule asks for them.
    ``numbers_at_once``: logits whose weights are in memory together (None: all of them); a CPU is
    faster with what its caches hold.
    """
    logits = logits_MV.float()
    columns = logits.shape[-1]
    local_top = logits.amax(-1, keepdim=True)
    top = shard.max(local_top)
    rows = len(logits) if numbers_at_once is None else numbers_at_once // columns
    shaped_at = 1.0 if temperature == 0 or top_k > 0 or top_p < 1 else temperature
    sums = _sums(logits, top, shaped_at, with_entropy, max(rows, 1))
    total = shard.sum(sums.plain_MC.sum(-1))
    if temperature == 0:
        local = torch.where(local_top == top, logits.argmax(-1, keepdim=True), columns)[:, 0]
    elif top_k > 0 or top_p < 1:
        shaped = torch.exp((logits - top) / temperature)
        shaped.masked_fill_(~_truncated(shaped, top_k, top_p, shard), 0.0)
        local = _invert(
            _chunk_sums(shaped), lambda at: shaped.gather(1, at), uniform_M, columns, shard
        )
    else:
        local = _invert(
            sums.shaped_MC,
            lambda at: torch.exp((logits.gather(1, at) - top) / temperature),
            uniform_M,
            columns,
            shard,
        )
    token = shard.min(torch.where(local < columns, local + shard.start, _NOWHERE))
    place = token - shard.start
    mine = (place >= 0) & (place < columns)
    at_token = logits.gather(1, place.clamp(0, columns - 1)[:, None]) - top
    drawn = at_token.exp()[:, 0].double()
    confidence = shard.sum(torch.where(mine, drawn, 0.0)) / total
    # Entropy of the softmax weight / total, weight = exp(exponent).
    entropy = total.log() - shard.sum(sums.expected_M) / total if with_entropy else total * 0
    return Draw(token, confidence, entropy)


def margins(logits_MV: Tensor, shard: WholeVocabulary = WHOLE) -> Tensor:
    """The best logit of each row less the second best (float64 [M]), forbidden ids at -inf; 0 where
    two are equal, inf where there is no second.
    """
    best = best_candidates(logits_MV.float(), 2, 2, shard).double()
    return best[:, 0] - best[:, 1]


_NOWHERE = torch.iinfo(torch.int64).max
_CHUNK = 128  # columns whose sum is kept, so that only one chunk of a row is summed one by one


class _Sums(NamedTuple):
    """float64 sums over chunks of this shard's columns."""

    plain_MC: Tensor  # of the softmax's weights, exp(logit - top)
    shaped_MC: Tensor  # of the weights at a temperature
    expected_M: Tensor  # sum of weight * (logit - top); empty if not asked for


def _sums(
    logits_MV: Tensor, top_M1: Tensor, temperature: float, with_entropy: bool, rows: int
) -> _Sums:
    """Sums over all columns, so many ``rows`` at a time."""
    plain, shaped, expected = [], [], []
    for logits, top in zip(logits_MV.split(rows), top_M1.split(rows), strict=True):
        exponent = logits - top
        weight = exponent.exp()
        plain.append(_chunk_sums(weight))
        if with_entropy:
            finite = torch.where(weight > 0, exponent, 0.0)
            expected.append((weight * finite).sum(-1, dtype=torch.float64))
        if temperature != 1:
            shaped.append(_chunk_sums(exponent.div_(temperature).exp_()))
    whole = torch.cat(plain)
    return _Sums(
        whole,
        torch.cat(shaped) if shaped else whole,
        torch.cat(expected) if expected else whole[:0, 0],
    )


def _chunk_sums(weight_MV: Tensor) -> Tensor:
    """float64 sums [M, C] over chunks of neighbouring columns."""
    rows, columns = weight_MV.shape
    wide = weight_MV.new_zeros(rows, -(-columns // _CHUNK) * _CHUNK, dtype=torch.float64)
    wide[:, :columns] = weight_MV
    return wide.unflatten(-1, (-1, _CHUNK)).sum(-1)


def _invert(
    sums_MC: Tensor,
    weight_at: Callable[[Tensor], Tensor],
    uniform_M: Tensor,
    columns: int,
    shard: WholeVocabulary,
) -> Tensor:
    """First local column [M] whose cumulative weight exceeds u times the total; the number of
    columns where this shard has none. ``weight_at``: weights at columns [M, n].

    The lowest id over the shards is the token: a later shard may offer a column of its own, but
    never before the one where the sum is first exceeded, which has a weight above zero.
    """
    running = F.pad(sums_MC.cumsum(-1), (1, 0))  # before each chunk
    before, total = shard.before(running[:, -1])
    running += before[:, None]
    target = (uniform_M * total)[:, None]
    number = torch.searchsorted(running[:, 1:].contiguous(), target, right=True)
    chunk = number.clamp(max=sums_MC.shape[1] - 1)
    column = chunk * _CHUNK + torch.arange(_CHUNK, device=chunk.device)
    weight = weight_at(column.clamp(max=columns - 1)).double()
    inside = torch.where(column < columns, weight, 0.0).cumsum(-1)
    place = torch.searchsorted(inside + running.gather(1, chunk), target, right=True)
    # Summed one by one, a chunk may round to less than its sum: then it is its last weight.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    local = chunk * _CHUNK + torch.minimum(place, last)
    return torch.where(number < sums_MC.shape[1], local, columns)[:, 0]


def _truncated(weight_MV: Tensor, top_k: int, top_p: float, shard: WholeVocabulary) -> Tensor:
    """bool [M, columns]: the ``top_k`` largest weights (0: all), and of those the nucleus. Every
    shard has the same number of columns.
    """
    if top_k == 0:
        need = top_p * shard.sum(weight_MV.sum(-1, dtype=torch.float64))
        return heaviest(weight_MV, need, shard)
    candidates = best_candidates(weight_MV, min(top_k, weight_MV.shape[-1]), top_k, shard)
    count = candidates.shape[-1]
    if top_p < 1:
        cumulative = candidates.cumsum(-1, dtype=torch.float64)
        need = top_p * cumulative[:, -1:]
        count = (cumulative - candidates < need).sum(-1, keepdim=True)
    return leading(weight_MV, candidates, count, shard)


def best_candidates(value_MV: Tensor, width: int, k: int, shard: WholeVocabulary) -> Tensor:
    """The k largest values over all shards, in falling order [M, at most k], found among the
    ``width`` largest of every shard: ranks x width numbers a row are gathered.
    """
    own = value_MV.topk(min(width, value_MV.shape[-1]), sorted=False).values
    own = F.pad(own, (0, width - own.shape[-1]), value=-torch.inf)
    every = shard.gather_rows(own)
    return every.topk(min(k, every.shape[-1])).values


def leading(
    value_MV: Tensor, candidates_MK: Tensor, count: int | Tensor, shard: WholeVocabulary
) -> Tensor:
    """bool [M, columns]: the first ``count`` (at least 1; or [M, 1]) of the largest values
    ``candidates_MK``, ties to the lowest id.
    """
    if isinstance(count, int):
        least = candidates_MK[:, count - 1 : count]
    else:
        least = candidates_MK.gather(1, (count - 1).clamp(min=0))
    room = count - (candidates_MK > least).sum(-1, keepdim=True)
    return _with_ties(value_MV > least, value_MV == least, room, shard)


def _with_ties(
    above_MV: Tensor, tied_MV: Tensor, room_M1: Tensor, shard: WholeVocabulary
) -> Tensor:
    """What is above, and as many of the tied as there is room for, lowest ids first."""
    lower_shards, _ = shard.before(tied_MV.sum(-1))
    order = lower_shards[:, None] + tied_MV.cumsum(-1, dtype=torch.int32)
    return above_MV | (tied_MV & (order <= room_M1))


def heaviest(weight_MV: Tensor, need_M: Tensor, shard: WholeVocabulary) -> Tensor:
    """bool [M, columns]: the smallest set of largest float32 weights (none negative) that sums to
    ``need_M``, ties to the lowest id.

    Such numbers are ordered like their bit patterns, so the smallest weight that is kept is found
    by a radix search over four digits, for each the sums from all its values on, which every shard
    reads from the running sums of its sorted weights. Exact, and nothing is gathered.
    """
    ordered = weight_MV.sort(-1, descending=True).values
    bits = -ordered.view(torch.int32)  # rising
    running = F.pad(ordered.cumsum(-1, dtype=torch.float64), (1, 0))
    least = torch.zeros_like(need_M, dtype=torch.int64)  # keeping everything is always enough
    above = torch.zeros_like(need_M)
    for shift in (24, 16, 8, 0):
        digits = torch.arange((1 << min(8, 31 - shift)) + 1, device=bits.device) << shift
        place = torch.searchsorted(bits, -(least[:, None] + digits).int(), right=True)
        mass = shard.sum(running.gather(1, place))  # of the weights from each value on
        enough = (mass[:, :-1] >= need_M[:, None]).sum(-1, keepdim=True)
        digit = (enough - 1).clamp_(min=0)
        least = least + (digit[:, 0] << shift)
        above = mass.gather(1, digit + 1)[:, 0]
    one = least.int().view(torch.float32)
    room = ((need_M - above) / one).ceil()[:, None]
    tied = (weight_MV == one[:, None]) & (weight_MV > 0)
    return _with_ties(weight_MV > one[:, None], tied, room, shard)


def quota(pass_index: Tensor, block_size: int, steps: int) -> Tensor:
    """Positions to commit in pass s (from 0): B // T, one more in the first B mod T passes, after T
    passes all of them.
    """
    regular = block_size // steps + (pass_index < block_size % steps).to(pass_index.dtype)
    return torch.where(pass_index < steps, regular, block_size)


def _most_confident(
    confidence_SB: Tensor, masked_SB: Tensor, allowance_S1: Tensor, block_size: int, steps: int
) -> Tensor:
    """bool [S, B]: the ``allowance`` most confident masked positions of each block, ties to the
    lowest; all positions where it is the whole block.
    """
    key = torch.where(masked_SB, confidence_SB, -1.0)
    column = torch.arange(block_size, device=key.device)
    if block_size <= steps:  # one position a pass, or none: nothing needs to be sorted
        first = key.argmax(1, keepdim=True)  # the lowest of equal ones
        return ((column == first) & (allowance_S1 > 0)) | (allowance_S1 >= block_size)
    order = torch.sort(key, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, column.expand_as(order))
    return rank < allowance_S1


def choose_commits(
    confidence_SB: Tensor,
    entropy_SB: Tensor,
    masked_SB: Tensor,
    pass_S: Tensor,
    *,
    steps: int,
    remasking: str,
    threshold: float | Tensor = 0.9,
    entropy_bound: float = 0.35,
) -> Tensor:
    """Which masked positions of each block to commit in this pass (bool [S, B], a subset of
    ``masked_SB``).

    - ``low_confidence_static``: the quota's most confident positions.
    - ``low_confidence_dynamic``: every position strictly above the threshold, and at least the
      quota's most confident.
    - ``sequential``: the quota's left-most positions.
    - ``entropy_bounded``: positions in order of rising entropy while their cumulative entropy stays
      below the bound, at least one; after ``steps`` passes whatever is left.
    """
    block_size = masked_SB.shape[1]
    allowance = quota(pass_S, block_size, steps)[:, None]
    if remasking == "sequential":
        return masked_SB & (masked_SB.long().cumsum(1) <= allowance)
    if remasking == "entropy_bounded":
        key = torch.where(masked_SB, entropy_SB, torch.inf)
        ordered, order = torch.sort(key, dim=1, stable=True)
        leading = (ordered.cumsum(1) < entropy_bound) | (pass_S >= steps)[:, None]
        leading[:, 0] = True
        return masked_SB & torch.zeros_like(masked_SB).scatter(1, order, leading)
    best = masked_SB & _most_confident(confidence_SB, masked_SB, allowance, block_size, steps)
    if remasking == "low_confidence_static":
        return best
    if remasking == "low_confidence_dynamic":
        return best | (masked_SB & (confidence_SB > threshold))
    raise ValueError(f"remasking={remasking!r} is unknown; use one of {', '.join(REMASKING)}")
