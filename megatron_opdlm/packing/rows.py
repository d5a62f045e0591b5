"""How rows are packed, and what the student's and the teacher's rows have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_opdlm.diffusion.blocks import block_shift
from megatron_opdlm.model.row_split import RowSplit
from megatron_opdlm.packing.prefix_trees import Tree
from megatron_opdlm.planning.balance import fill_bins
from megatron_opdlm.records import State


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How rows are packed."""

    block_size: int  # tokens
    mask_id: int
    logit_shift: bool
    tokens_per_microbatch: int  # a longer sequence has a microbatch for itself
    align: int  # a rank's rows are a multiple of this long: tensor ranks, for sequence parallelism
    device: torch.device
    context_ranks: int = 1  # they share every row
    context_rank: int = 0
    alignment: str = "absolute"  # response: blocks counted from the response's start
    # Whether common beginnings are packed once: not for kernels that compute hidden pairs, too.
    share_student: bool = True
    share_teacher: bool = True
    # Number of rows of this rank -> largest over the ranks that keep step; called by all of them
    rows_in_step: Callable[[int], int] = lambda rows: rows

    def shift(self, state: State) -> int:
        """block(i) = (i + shift) // block_size"""
        return block_shift(len(state.prompt_ids), self.block_size, self.alignment)

    def rows(self, sizes: Sequence[int]) -> list[list[int]]:
        """Which sequences of these sizes share a row; rows without any keep this rank in step."""
        rows = fill_bins(sizes, self.tokens_per_microbatch)
        return rows + [[] for _ in range(self.rows_in_step(len(rows)) - len(rows))]


def counted_positions(state: State) -> ndarray:
    """Absolute positions under loss, rising."""
    return len(state.prompt_ids) + np.flatnonzero(state.counted)


def sequence_of(state: State) -> tuple[int, ...]:
    """Prompt and response: what the teacher is asked about."""
    return (*state.prompt_ids, *state.response_ids)


def joined(parts: Sequence[ndarray], dtype: type = np.int64) -> Tensor:
    """Parts of a packed row, one after the other."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))


def row_tail(tokens: int, packing: Packing) -> ndarray:
    """Zeros that belong to no sequence; attention needs at least one token on every rank."""
    multiple = packing.align * packing.context_ranks
    return np.zeros(-tokens % multiple or (0 if tokens else multiple), np.int64)


def row_reads(trees: Sequence[Tree]) -> Tensor:
    """What is read of each tree, by its place in the packed row."""
    starts = accumulate((len(tree.tokens) for tree in trees), initial=0)
    return joined(
        [read + start for tree, start in zip(trees, starts, strict=False) for read in tree.read]
    )


def branches(trees: Sequence[Tree], tail: ndarray) -> Tensor | None:
    """Of a row's tokens [N], None where no tree has two branches."""
    if all(len(tree.members) == 1 for tree in trees):
        return None
    return joined([*(tree.branch for tree in trees), tail])


def own_part(split: RowSplit, read: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A context rank's part of a row: the packed indices [n] of its tokens, which reads [M] are
    among them, and where.
    """
    own = split.of_rank(rank)
    is_own = torch.zeros(len(split.shares), dtype=torch.bool)
    is_own[own] = True
    mine = torch.nonzero(is_own[read]).flatten()
    return own, mine, torch.searchsorted(own, read[mine])
