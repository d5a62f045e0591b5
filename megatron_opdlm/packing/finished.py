"""The teacher's rows: each finished sequence once, whatever the number of its states, up to the
last token that a prediction needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import causal_plan, two_stream_plan
from megatron_opdlm.model.row_split import RowSplit, split_row
from megatron_opdlm.packing.prefix_trees import Piece, Tree, grow
from megatron_opdlm.packing.rows import (
    Packing,
    branches,
    counted_positions,
    joined,
    own_part,
    row_reads,
    row_tail,
    sequence_of,
)
from megatron_opdlm.records import State


@dataclass(frozen=True, kw_only=True)
class FinishedBatch:
    """Finished sequences that the teacher is asked about together: a row of N tokens, of which
    this rank has n. It computes U of the targets and keeps the K that its states ask for, which are
    the same without context parallelism.
    """

    tokens: Tensor  # [n]
    positions: Tensor  # [n]
    read: Tensor  # [U] which of the n tokens' hidden state predicts a counted token
    lengths: list[int]  # packed tokens of each sequence or tree
    # [N] place in its sequence, and branch, of each token, on the host; None: there are no trees
    block: Tensor | None
    branch: Tensor | None
    split: RowSplit  # of the N tokens over the context ranks, on the host
    most: int  # largest U of a context rank
    wanted: Tensor  # [K] places among all context ranks' targets, each rank's part ``most`` long

    @property
    def plan(self) -> AttentionPlan:
        """Built anew at each use, as the student's."""
        device, tokens = self.tokens.device, len(self.split.shares)
        if self.block is None:
            return causal_plan(self.lengths, tokens, device, read=self.read, split=self.split)
        return two_stream_plan(
            self.lengths,
            self.block,
            torch.ones(tokens, dtype=torch.bool),
            device,
            branch_N=self.branch,
            read=self.read,
            split=self.split,
        )


class Questions:
    """What is asked of the teacher: each distinct finished sequence once, at every position that
    any of its states counts."""

    def __init__(self, states: Sequence[State]) -> None:
        asked: dict[tuple[int, ...], list[ndarray]] = {}
        for state in states:
            positions = counted_positions(state)
            if len(positions):
                asked.setdefault(sequence_of(state), []).append(positions)
        self._read = {key: np.unique(np.concatenate(each)) - 1 for key, each in asked.items()}
        self._prompt = {sequence_of(state): tuple(state.prompt_ids) for state in states}
        self._first: dict[tuple[int, ...], int] = {}

    def pack(self, packing: Packing) -> list[FinishedBatch]:
        """Rows of at most ``tokens_per_microbatch`` tokens; fixes the order of the targets."""
        keys = list(self._read)
        trees = grow(
            [_question(key, read) for key, read in self._read.items()],
            [self._prompt[key] for key in keys],
            packing.tokens_per_microbatch,
            share=packing.share_teacher,
        )
        groups = packing.rows([len(tree.tokens) for tree in trees])
        targets = 0
        for key in (keys[place] for group in groups for i in group for place in trees[i].members):
            self._first[key] = targets
            targets += len(self._read[key])
        return [self._batch([trees[i] for i in group], packing) for group in groups]

    def rows(self, state: State, positions: ndarray) -> ndarray:
        """Rows of the targets for counted positions of a state."""
        if not len(positions):
            return positions
        key = sequence_of(state)
        return self._first[key] + np.searchsorted(self._read[key], positions - 1)

    def _batch(self, trees: Sequence[Tree], packing: Packing) -> FinishedBatch:
        lengths = [len(tree.tokens) for tree in trees]
        tail = row_tail(sum(lengths), packing)
        tokens = joined([*(tree.tokens for tree in trees), tail])
        positions = joined([*(tree.positions for tree in trees), tail])
        read = row_reads(trees)
        branch = branches(trees, tail)
        split = split_row(len(tokens), read, packing.context_ranks)
        own, _, own_read = own_part(split, read, packing.context_rank)
        most, places = _gathered_places(split, read)
        return FinishedBatch(
            tokens=tokens[own].to(packing.device),
            positions=positions[own].to(packing.device),
            read=own_read.to(packing.device),
            lengths=lengths or [len(tail)],
            block=None if branch is None else positions,
            branch=branch,
            split=split,
            most=most,
            wanted=places.to(packing.device),
        )


def _question(tokens: tuple[int, ...], read: ndarray) -> Piece:
    """A finished sequence up to the last token that is read, under the causal mask."""
    place = np.arange(int(read[-1]) + 1)
    return Piece(
        tokens=np.array(tokens[: len(place)]),
        positions=place,
        block=place,
        clean=np.ones(len(place), bool),
        read=read,
    )


def _gathered_places(split: RowSplit, read: Tensor) -> tuple[int, Tensor]:
    """Most reads of a context rank, and the place of each read when all ranks' are laid end to end,
    each rank's part that long.
    """
    mine = [own_part(split, read, rank)[1] for rank in range(split.ranks)]
    most = max(map(len, mine))
    places = torch.empty_like(read)
    for rank, reads in enumerate(mine):
        places[reads] = rank * most + torch.arange(len(reads))
    return most, places
