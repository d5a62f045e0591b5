"""Context parallelism: a packed row split over ranks by its tokens, its attention by heads.

Everything but attention works token by token, so each rank takes an equal share of the tokens.
Before attention the ranks trade: each gives its tokens' queries, keys and values for all heads, and
gets all tokens' for its share of the heads; afterwards they trade back (Jacobs et al., "DeepSpeed
Ulysses", 2023, arXiv 2309.14509). So every rank attends under the whole mask, whatever its shape,
with any kernel, and the work is the same on all ranks; no tensor of a layer is ever gathered whole.

A row has N tokens, C ranks, n = N / C tokens a rank; d is the size of a head.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor

from megatron_opdlm import parallel


@dataclass(frozen=True, kw_only=True)
class RowSplit:
    """Which rank has which tokens of a packed row."""

    ranks: int
    shares: Tensor  # [N] packed indices: the tokens of rank 0, rising, then those of rank 1, ...
    order: Tensor  # [N] place of each packed token in ``shares``

    def of_rank(self, rank: int) -> Tensor:
        """Packed indices [n] of a rank's tokens, rising."""
        return self.shares.chunk(self.ranks)[rank]

    def to(self, device: torch.device) -> "RowSplit":
        """The same on another device."""
        return RowSplit(
            ranks=self.ranks, shares=self.shares.to(device), order=self.order.to(device)
        )


def split_row(tokens: int, read_M: Tensor, ranks: int) -> RowSplit:
    """Deal ``tokens``, a multiple of ``ranks``, out: the same number to each rank and, within one,
    the same number of those whose hidden states are read. The output layer and the last layer's
    feed-forward run for them alone, and they lie together at the sequences' ends.
    """
    is_read = torch.zeros(tokens, dtype=torch.bool)
    is_read[read_M] = True
    read, other = torch.nonzero(is_read).flatten(), torch.nonzero(~is_read).flatten()
    rank = torch.empty(tokens, dtype=torch.int64)
    rank[read] = torch.arange(len(read)) * ranks // max(len(read), 1)
    room = tokens // ranks - torch.bincount(rank[read], minlength=ranks)
    rank[other] = torch.repeat_interleave(torch.arange(ranks), room)
    shares = rank.argsort(stable=True)
    return RowSplit(ranks=ranks, shares=shares, order=shares.argsort())


def by_heads(
    query: Tensor, key: Tensor, value: Tensor, split: RowSplit
) -> tuple[Tensor, Tensor, Tensor]:
    """Own tokens with all heads of query [n, heads, d], key and value [n, groups, d] -> all tokens
    in packed order with own heads: [N, heads / C, d] and the groups that they use.

    Where C does not divide the groups, a group goes to every rank whose heads use it. Gradient: the
    exchange backwards, summed over those ranks.
    """
    copies = _copies(key.shape[1], split.ranks)
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    parts = [x.unflatten(1, (split.ranks, -1)) for x in (query, key, value)]
    sent = torch.cat(parts, dim=2).transpose(0, 1)  # [C receivers, n, heads and groups, d]
    received = all_to_all(parallel.context_group(), sent).flatten(0, 1)
    whole = received.index_select(0, split.order)
    own_query, own_key, own_value = whole.split([part.shape[2] for part in parts], dim=1)
    return own_query, own_key, own_value


def _copies(groups: int, ranks: int) -> int:
    """How often each group is repeated so that the ranks get the same number."""
    return ranks // math.gcd(ranks, groups)


def config_by_heads(config: Any) -> Any:
    """Megatron's description of the attention between ``by_heads`` and ``by_tokens``: that of a
    model with a context rank's heads and without context parallelism.
    """
    ranks, tensor = config.context_parallel_size, config.tensor_model_parallel_size
    own = copy.copy(config)
    own.context_parallel_size = 1
    own.num_attention_heads = config.num_attention_heads // ranks
    copies = _copies(config.num_query_groups // tensor, ranks)
    own.num_query_groups = config.num_query_groups * copies // ranks
    return own


def by_tokens(out: Tensor, split: RowSplit) -> Tensor:
    """All tokens in packed order with own heads [N, heads / C, d] -> own tokens with all heads
    [n, heads, d]. Gradient: the exchange backwards.
    """
    sent = out.index_select(0, split.shares).unflatten(0, (split.ranks, -1))
    received = all_to_all(parallel.context_group(), sent)  # [C senders, n, heads / C, d]
    return received.transpose(0, 1).flatten(1, 2)
