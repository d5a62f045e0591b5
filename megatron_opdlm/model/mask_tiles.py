"""Which square tiles of a packed row's mask are empty, full or mixed, without looking at all pairs.

A tile of queries and one of keys are compared by the ranges of what their tokens are. That decides
whether every pair is visible, and nearly always whether any is; pairs are looked at only in the
tiles that are left, those beside the diagonals and at the ends of sequences: O(T) of the T x T.
T tiles a side, L tokens each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion.masks import TRUNK

# (query, key) pairs whose visibility is computed at once: a few times 16 MiB
_PAIRS_AT_ONCE = 2**24
_NONE = torch.iinfo(torch.int32)  # an empty range: lowest is max, highest is min

# (query index, key index) -> bool, for tensors of indices that broadcast against each other.
Visible = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What each token of a row of T * L is, as ``two_stream_visible`` has it; tokens of different
    documents do not see each other.
    """

    document: Tensor  # int32 [T * L]
    block: Tensor  # int32 [T * L]
    clean: Tensor  # bool [T * L]
    branch: Tensor  # int32 [T * L], as ``branch_visible`` has it


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Lowest and highest number in each tile, [T, 1] for queries and [1, T] for keys."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, number: Tensor, of_these: Tensor, tile: int) -> "_Range":
        number, of_these = number.view(-1, tile), of_these.view(-1, tile)
        low = torch.where(of_these, number, _NONE.max).amin(1)
        return cls(low=low[:, None], high=torch.where(of_these, number, _NONE.min).amax(1)[:, None])

    def of_keys(self) -> "_Range":
        return _Range(low=self.low.T, high=self.high.T)

    def meets(self, other: "_Range") -> Tensor:
        """bool [T, T]"""
        return (self.low <= other.high) & (other.low <= self.high)

    def is_one_with(self, other: "_Range") -> Tensor:
        """bool [T, T]: both hold one number, the same."""
        return (self.low == self.high) & (other.low == other.high) & (self.low == other.low)


def occupied_tiles(tokens: Tokens, visible: Visible, tile: int) -> tuple[Tensor, Tensor]:
    """bool [T, T] twice: tiles in which some pair is visible, and those in which every pair is."""
    some, undecided, every = _by_ranges(tokens, tile)
    query, key = undecided.nonzero(as_tuple=True)
    place = torch.arange(tile, device=some.device)
    at_once = max(1, _PAIRS_AT_ONCE // tile**2)
    for first in range(0, len(query), at_once):
        chosen = slice(first, first + at_once)
        q = (query[chosen, None] * tile + place)[:, :, None]
        k = (key[chosen, None] * tile + place)[:, None, :]
        some[query[chosen], key[chosen]] = visible(q, k).flatten(1).any(1)
    return some, every


def _by_ranges(tokens: Tokens, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """bool [T, T] three times: tiles in which some pair is visible for certain, in which one may
    be, and in which every pair is.
    """
    any_token = torch.ones_like(tokens.clean)
    document = _Range.of(tokens.document, any_token, tile)
    every_block = _Range.of(tokens.block, any_token, tile)
    clean = _Range.of(tokens.block, tokens.clean, tile)
    noisy = _Range.of(tokens.block, ~tokens.clean, tile)
    key_clean, key_noisy = clean.of_keys(), noisy.of_keys()
    branch = _Range.of(tokens.branch, any_token, tile)
    key_branch = branch.of_keys()
    beside_trunk = _Range.of(tokens.branch, tokens.branch != TRUNK, tile).of_keys()
    # Every pair is of one document, and its key on the trunk or on the query's branch.
    related = document.is_one_with(document.of_keys()) & (
        (key_branch.high == TRUNK) | branch.is_one_with(beside_trunk)
    )
    unrelated = (key_branch.low > TRUNK) & ~branch.meets(key_branch)
    # The first clean key is before the last query: that pair is visible, if they are related.
    earlier = key_clean.low < every_block.high
    same = clean.meets(key_clean) | noisy.meets(key_noisy)
    some = related & earlier
    undecided = document.meets(document.of_keys()) & (earlier | same) & ~some & ~unrelated
    # Clean keys: none after a clean query, all before the noisy ones. Noisy keys: of one block,
    # and so are the queries, all of them noisy. Comparisons with an empty range are true.
    sees_clean = (key_clean.high <= clean.low) & (key_clean.high < noisy.low)
    no_noisy_keys = key_noisy.low > key_noisy.high
    no_clean_queries = clean.low > clean.high
    sees_noisy = no_noisy_keys | (no_clean_queries & noisy.is_one_with(key_noisy))
    return some, undecided, related & sees_clean & sees_noisy
