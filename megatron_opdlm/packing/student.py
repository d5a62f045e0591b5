"""The student's rows [prompt | clean | noisy]: the noisy copy of the blocks that have counted
positions, the clean copy up to the last of those blocks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_opdlm.diffusion.blocks import block_lengths
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import two_stream_plan
from megatron_opdlm.model.row_split import RowSplit, split_row
from megatron_opdlm.packing.finished import Questions
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

PLACES = 32  # of a block that are told apart at the most


def place_width(block_size: int) -> int:
    """Neighbouring tokens of a block that count as one place of it."""
    return -(-block_size // PLACES)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One microbatch of the student, and what is read from it: a row of N tokens, of which this
    rank has n (all of them without context parallelism) with M counted positions.
    """

    states: list[State]  # of the whole row
    student_tokens: Tensor  # [n]
    student_positions: Tensor  # [n] the noisy copy repeats the positions of the clean one
    student_read: Tensor  # [M] which of the n tokens' hidden state predicts the token
    lengths: list[int]  # packed tokens of each sequence or tree that has any; in all at most N
    block: Tensor  # [N] block of each token, counted within its sequence, on the host
    clean: Tensor  # bool [N], False in the noisy copy, on the host
    branch: Tensor | None  # [N] of trees, on the host; None: there are none
    split: RowSplit  # of the N tokens over the context ranks, on the host
    target: Tensor  # [M] row of the teacher's targets
    labels: Tensor  # [M] the tokens of the finished sequence
    row_weight: Tensor  # [M] 1 / counted positions of the sequence
    sequence: Tensor  # [M] index into ``states``
    position: Tensor  # [M] of the token in its response
    place: Tensor  # [M] of the token in its block, in units of ``place_width``
    masked_share: Tensor  # [M] share of its block's response tokens that are masked

    @property
    def student_plan(self) -> AttentionPlan:
        """Built anew at each use: the masks of all microbatches of a step would not fit."""
        return two_stream_plan(
            self.lengths,
            self.block,
            self.clean,
            self.student_tokens.device,
            branch_N=self.branch,
            read=self.student_read,
            split=self.split,
        )


def student_tokens(state: State, packing: Packing) -> int:
    """Packed tokens that the student reads for a state, 0 without counted positions."""
    size, shift = packing.block_size, packing.shift(state)
    start, end = len(state.prompt_ids) + shift, len(state.prompt_ids + state.response_ids) + shift
    blocks = {(start + i) // size for i, counted in enumerate(state.counted) if counted}
    if not blocks:
        return 0
    last = max(blocks) * size
    return last - shift + (len(blocks) - 1) * size + min(size, end - last)


def beginnings(states: Sequence[State]) -> list[tuple[int, ...]]:
    """What each state may share: states of one response their prompt and clean copy, states of
    several responses to a prompt the prompt.
    """
    count = Counter(map(sequence_of, states))
    return [sequence_of(s) if count[sequence_of(s)] > 1 else tuple(s.prompt_ids) for s in states]


def pack_update(
    states: Sequence[State], questions: Questions, packing: Packing
) -> list[PackedBatch]:
    trees = grow(
        [_piece(state, packing) for state in states],
        beginnings(states),
        packing.tokens_per_microbatch,
        share=packing.share_student,
    )
    groups = packing.rows([len(tree.tokens) for tree in trees])
    return [_pack(states, [trees[i] for i in group], questions, packing) for group in groups]


def _pack(
    of_update: Sequence[State], trees: list[Tree], questions: Questions, packing: Packing
) -> PackedBatch:
    states = [of_update[place] for tree in trees for place in tree.members]
    counted = [counted_positions(state) for state in states]
    lengths = [len(tree.tokens) for tree in trees]
    counts = torch.tensor([len(positions) for positions in counted], dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(states)), counts)
    tail = row_tail(sum(lengths), packing)
    tokens = joined([*(tree.tokens for tree in trees), tail])
    positions = joined([*(tree.positions for tree in trees), tail])
    read = row_reads(trees)
    split = split_row(len(tokens), read, packing.context_ranks)
    own, mine, own_read = own_part(split, read, packing.context_rank)
    target = joined([questions.rows(s, at) for s, at in zip(states, counted, strict=True)])
    label = joined([_labels(s, at) for s, at in zip(states, counted, strict=True)])
    share = [_masked_shares(s, packing) for s in states]
    position = joined([at - len(s.prompt_ids) for s, at in zip(states, counted, strict=True)])
    place = joined([_places(s, at, packing) for s, at in zip(states, counted, strict=True)])
    device = packing.device
    return PackedBatch(
        states=states,
        student_tokens=tokens[own].to(device),
        student_positions=positions[own].to(device),
        student_read=own_read.to(device),
        lengths=[length for length in lengths if length] or [len(tail)],
        block=joined([*(tree.block for tree in trees), tail]),
        clean=joined([*(tree.clean for tree in trees), tail == 0], bool),
        branch=branches(trees, tail),
        split=split,
        target=target[mine].to(device),
        labels=label[mine].to(device),
        row_weight=(1.0 / counts[sequence])[mine].to(device),
        sequence=sequence[mine].to(device),
        position=position[mine].to(device),
        place=place[mine].to(device),
        masked_share=joined(share, np.float32)[mine].to(device),
    )


def _piece(state: State, packing: Packing) -> Piece:
    """What the student reads for a state; the counted positions are what it is asked for."""
    size, prompt, shift = packing.block_size, len(state.prompt_ids), packing.shift(state)
    finished = np.array(state.prompt_ids + state.response_ids)
    counted = counted_positions(state)
    block = (np.arange(len(finished)) + shift) // size
    used = np.zeros((len(finished) + shift) // size + 1, bool)
    used[block[counted]] = True
    noisy = np.flatnonzero(used[block])
    clean = int(block[counted[-1]]) * size - shift if len(counted) else 0
    at = clean + np.searchsorted(noisy, counted)
    if packing.logit_shift:  # one before: for a block's first position the clean copy's last token
        at = np.where((counted + shift) % size == 0, counted, at) - 1
    filled = finished.copy()
    filled[prompt:][np.array(state.masked, bool)] = packing.mask_id
    positions = np.concatenate([np.arange(clean), noisy])
    return Piece(
        tokens=np.concatenate([finished[:clean], filled[noisy]]),
        positions=positions,
        block=block[positions],
        clean=np.arange(len(positions)) < clean,
        read=at,
    )


def _places(state: State, counted: ndarray, packing: Packing) -> ndarray:
    """Of counted positions their places in their blocks, in units of ``place_width``."""
    inside = (counted + packing.shift(state)) % packing.block_size
    return inside // place_width(packing.block_size)


def _labels(state: State, counted: ndarray) -> ndarray:
    return np.array(state.response_ids)[counted - len(state.prompt_ids)]


def _masked_shares(state: State, packing: Packing) -> ndarray:
    """For each counted position the share of its block's response tokens that are masked."""
    sizes = len(state.prompt_ids), len(state.response_ids), packing.block_size
    lengths = np.array(block_lengths(*sizes, packing.shift(state)))
    masked = np.add.reduceat(state.masked, lengths.cumsum() - lengths, dtype=np.int64)
    shares = (masked / lengths).astype(np.float32)
    return np.repeat(shares, lengths)[np.array(state.counted, bool)]
