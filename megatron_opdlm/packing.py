"""States -> packed rows: microbatches of the student, finished sequences for the teacher.

Only what the loss depends on is packed. The student reads [prompt | clean | noisy]: the noisy copy
of the blocks that have counted positions, the clean copy up to the last of those blocks. The
teacher reads each finished sequence once, whatever the number of its states, up to the last token
that a prediction needs. What several responses to a prompt begin with stands in a row once
(prefix_trees.py). Nothing is padded.

With context parallelism every context rank packs the same rows and keeps its share of their tokens.
Ranks that share out experts need each other in every forward, so they all get as many rows as the
one that has most.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_opdlm.diffusion.blocks import block_lengths, block_shift
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import causal_plan, two_stream_plan
from megatron_opdlm.model.row_split import RowSplit, split_row
from megatron_opdlm.planning.balance import fill_bins
from megatron_opdlm.prefix_trees import Piece, Tree, grow
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


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What one replica works on in a step, or its context rank's share. The wanted targets of
    ``finished``, one after the other, are what ``PackedBatch.target`` counts in."""

    updates: list[list[PackedBatch]]  # microbatches of each update of an inner epoch
    finished: list[FinishedBatch]


def pack_step(updates: Sequence[Sequence[State]], packing: Packing) -> StepBatches:
    """Pack one replica's states of each update of a step.

    An update without states, and a step without a counted position, are rows of ``align`` tokens
    without loss: every rank takes part in the collectives.
    """
    questions = _Questions([state for states in updates for state in states])
    finished = questions.pack(packing)
    packed = [_pack_update(states, questions, packing) for states in updates]
    return _keep_wanted(packed, finished)


def _keep_wanted(updates: list[list[PackedBatch]], finished: list[FinishedBatch]) -> StepBatches:
    """Leave this rank the targets that its share of the rows asks for, and number them anew."""
    used = torch.cat([batch.target for batches in updates for batch in batches]).unique()
    kept, first = [], 0
    for batch in finished:
        inside = (used >= first) & (used < first + len(batch.wanted))
        kept.append(replace(batch, wanted=batch.wanted[used[inside] - first]))
        first += len(batch.wanted)
    renumbered = [
        [replace(batch, target=torch.searchsorted(used, batch.target)) for batch in batches]
        for batches in updates
    ]
    return StepBatches(updates=renumbered, finished=kept)


def student_tokens(state: State, packing: Packing) -> int:
    """Packed tokens that the student reads for a state, 0 without counted positions."""
    size, shift = packing.block_size, packing.shift(state)
    start, end = len(state.prompt_ids) + shift, len(state.prompt_ids + state.response_ids) + shift
    blocks = {(start + i) // size for i, counted in enumerate(state.counted) if counted}
    if not blocks:
        return 0
    last = max(blocks) * size
    return last - shift + (len(blocks) - 1) * size + min(size, end - last)


def _piece(state: State, packing: Packing) -> Piece:
    """What the student reads for a state; the counted positions are what it is asked for."""
    size, prompt, shift = packing.block_size, len(state.prompt_ids), packing.shift(state)
    finished = torch.tensor(state.prompt_ids + state.response_ids)
    masked = torch.tensor([False] * prompt + state.masked, dtype=torch.bool)
    counted = _counted_positions(state)
    block = (torch.arange(len(finished)) + shift) // size
    used = torch.zeros((len(finished) + shift) // size + 1, dtype=torch.bool)
    used[block[counted]] = True
    noisy = torch.nonzero(used[block]).flatten()
    clean = int(block[counted[-1]]) * size - shift if len(counted) else 0
    at = clean + torch.searchsorted(noisy, counted)
    if packing.logit_shift:  # one before: for a block's first position the clean copy's last token
        at = torch.where((counted + shift) % size == 0, counted, at) - 1
    filled = torch.where(masked, packing.mask_id, finished)
    return Piece(
        tokens=torch.cat([finished[:clean], filled[noisy]]),
        positions=torch.cat([torch.arange(clean), noisy]),
        block=block[torch.cat([torch.arange(clean), noisy])],
        clean=torch.arange(clean + len(noisy)) < clean,
        read=at,
    )


def _counted_positions(state: State) -> Tensor:
    """Absolute positions under loss, rising."""
    counted = torch.tensor(state.counted, dtype=torch.bool)
    return len(state.prompt_ids) + torch.nonzero(counted).flatten()


def beginnings(states: Sequence[State]) -> list[tuple[int, ...]]:
    """What each state may share: states of one response their prompt and clean copy, states of
    several responses to a prompt the prompt.
    """
    count = Counter(map(_key, states))
    return [_key(s) if count[_key(s)] > 1 else tuple(s.prompt_ids) for s in states]


def _pack_update(
    states: Sequence[State], questions: "_Questions", packing: Packing
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
    of_update: Sequence[State], trees: list[Tree], questions: "_Questions", packing: Packing
) -> PackedBatch:
    states = [of_update[place] for tree in trees for place in tree.members]
    counted = [_counted_positions(state) for state in states]
    lengths = [len(tree.tokens) for tree in trees]
    counts = torch.tensor([len(positions) for positions in counted], dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(states)), counts)
    tail = _tail(sum(lengths), packing)
    tokens = _row([*(tree.tokens for tree in trees), tail])
    positions = _row([*(tree.positions for tree in trees), tail])
    read = _row(_shifted([_row(tree.read) for tree in trees], lengths))
    split = split_row(len(tokens), read, packing.context_ranks)
    own, mine, own_read = _own(split, read, packing.context_rank)
    target = _row([questions.rows(s, at) for s, at in zip(states, counted, strict=True)])
    label = _row([_labels(s, at) for s, at in zip(states, counted, strict=True)])
    share = [_masked_shares(s, packing) for s in states]
    position = _row([at - len(s.prompt_ids) for s, at in zip(states, counted, strict=True)])
    place = _row([_places(s, at, packing) for s, at in zip(states, counted, strict=True)])
    device = packing.device
    return PackedBatch(
        states=states,
        student_tokens=tokens[own].to(device),
        student_positions=positions[own].to(device),
        student_read=own_read.to(device),
        lengths=[length for length in lengths if length] or [len(tail)],
        block=_row([*(tree.block for tree in trees), tail]),
        clean=torch.cat([*(tree.clean for tree in trees), tail == 0]),
        branch=_branches(trees, tail),
        split=split,
        target=target[mine].to(device),
        labels=label[mine].to(device),
        row_weight=(1.0 / counts[sequence])[mine].to(device),
        sequence=sequence[mine].to(device),
        position=position[mine].to(device),
        place=place[mine].to(device),
        masked_share=torch.cat([*share, torch.zeros(0)])[mine].to(device),
    )


def _branches(trees: Sequence[Tree], tail: Tensor) -> Tensor | None:
    """Of a row's tokens [N], None where no tree has two branches."""
    if all(len(tree.members) == 1 for tree in trees):
        return None
    return _row([*(tree.branch for tree in trees), tail])


def _own(split: RowSplit, read: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A context rank's part of a row: the packed indices [n] of its tokens, which reads [M] are
    among them, and where.
    """
    own = split.of_rank(rank)
    is_own = torch.zeros(len(split.shares), dtype=torch.bool)
    is_own[own] = True
    mine = torch.nonzero(is_own[read]).flatten()
    return own, mine, torch.searchsorted(own, read[mine])


class _Questions:
    """What is asked of the teacher: each distinct finished sequence once, at every position that
    any of its states counts."""

    def __init__(self, states: Sequence[State]) -> None:
        asked: dict[tuple[int, ...], list[Tensor]] = {}
        for state in states:
            positions = _counted_positions(state)
            if len(positions):
                asked.setdefault(_key(state), []).append(positions)
        self._read = {key: torch.cat(each).unique() - 1 for key, each in asked.items()}
        self._prompt = {_key(state): tuple(state.prompt_ids) for state in states}
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

    def rows(self, state: State, positions: Tensor) -> Tensor:
        """Rows of the targets for counted positions of a state."""
        if not len(positions):
            return positions
        key = _key(state)
        return self._first[key] + torch.searchsorted(self._read[key], positions - 1)

    def _batch(self, trees: Sequence[Tree], packing: Packing) -> FinishedBatch:
        lengths = [len(tree.tokens) for tree in trees]
        tail = _tail(sum(lengths), packing)
        tokens = _row([*(tree.tokens for tree in trees), tail])
        positions = _row([*(tree.positions for tree in trees), tail])
        read = _row(_shifted([_row(tree.read) for tree in trees], lengths))
        branch = _branches(trees, tail)
        split = split_row(len(tokens), read, packing.context_ranks)
        own, _, own_read = _own(split, read, packing.context_rank)
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


def _question(tokens: tuple[int, ...], read: Tensor) -> Piece:
    """A finished sequence up to the last token that is read, under the causal mask."""
    place = torch.arange(int(read[-1]) + 1)
    return Piece(
        tokens=torch.tensor(tokens[: len(place)]),
        positions=place,
        block=place,
        clean=torch.ones(len(place), dtype=torch.bool),
        read=read,
    )


def _gathered_places(split: RowSplit, read: Tensor) -> tuple[int, Tensor]:
    """Most reads of a context rank, and the place of each read when all ranks' are laid end to end,
    each rank's part that long.
    """
    mine = [_own(split, read, rank)[1] for rank in range(split.ranks)]
    most = max(map(len, mine))
    places = torch.empty_like(read)
    for rank, reads in enumerate(mine):
        places[reads] = rank * most + torch.arange(len(reads))
    return most, places


def _key(state: State) -> tuple[int, ...]:
    return (*state.prompt_ids, *state.response_ids)


def _tail(tokens: int, packing: Packing) -> Tensor:
    """Zeros that belong to no sequence; attention needs at least one token on every rank."""
    multiple = packing.align * packing.context_ranks
    return torch.zeros(-tokens % multiple or (0 if tokens else multiple), dtype=torch.int64)


def _row(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])


def _shifted(parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Indices within each sequence -> indices of the packed row."""
    starts = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    return [part + start for part, start in zip(parts, starts, strict=False)]


def _places(state: State, counted: Tensor, packing: Packing) -> Tensor:
    """Of counted positions their places in their blocks, in units of ``place_width``."""
    inside = (counted + packing.shift(state)) % packing.block_size
    return inside // place_width(packing.block_size)


def _labels(state: State, counted: Tensor) -> Tensor:
    return torch.tensor(state.response_ids, dtype=torch.int64)[counted - len(state.prompt_ids)]


def _masked_shares(state: State, packing: Packing) -> Tensor:
    """For each counted position the share of its block's response tokens that are masked."""
    shares: list[float] = []
    start = 0
    sizes = len(state.prompt_ids), len(state.response_ids), packing.block_size
    for length in block_lengths(*sizes, packing.shift(state)):
        masked = sum(state.masked[start : start + length])
        shares += [masked / length] * length
        start += length
    return torch.tensor(shares)[torch.tensor(state.counted, dtype=torch.bool)]
