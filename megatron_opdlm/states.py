"""Trajectories -> partially denoised states -> packed two-stream batches.

A state is one point of a sequence's own denoising trajectory: which response tokens are still
masked. The student reads it as [prompt | clean response | noisy response] under the mask of
``diffusion/masks.py``; the teacher reads [prompt | response].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.blocks import block_lengths, first_block_start
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import causal_plan, two_stream_plan
from megatron_opdlm.records import Trajectory, Vocabulary


@dataclass(frozen=True, kw_only=True)
class State:
    """One sequence with the noisy input that the student is trained on."""

    sample: int
    prompt_ids: list[int]
    response_ids: list[int]  # [R]
    masked: list[bool]  # [R] True where the noisy copy holds the mask token
    counted: list[bool]  # [R] masked and under loss (DESIGN 4b, Loss)
    trained_tokens: int  # response tokens through the first end token, masked or not

    @property
    def cost(self) -> int:
        """Positions of the two-stream sequence and of the teacher's: what packing and balancing
        count.
        """
        return 2 * len(self.prompt_ids) + 3 * len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One microbatch: packed rows for student and teacher, and what is read from them. M counted
    positions.
    """

    states: list[State]
    student_tokens: Tensor  # [N]
    student_positions: Tensor  # [N] the noisy copy repeats the positions of the clean one
    student_plan: AttentionPlan
    student_read: Tensor  # [M] packed index whose hidden state predicts the token
    teacher_tokens: Tensor  # [N']
    teacher_positions: Tensor  # [N']
    teacher_plan: AttentionPlan
    teacher_read: Tensor  # [M] packed index of the position before the token
    labels: Tensor  # [M] the tokens of the finished sequence
    row_weight: Tensor  # [M] 1 / counted positions of the sequence
    sequence: Tensor  # [M] index into ``states``
    masked_share: Tensor  # [M] share of its block's response tokens that are masked


def choose_states(
    trajectories: Sequence[Trajectory],
    *,
    mode: str,
    block_size: int,
    vocabulary: Vocabulary,
    exclude_eos: bool,
    key: tuple[int, int],
) -> list[State]:
    """Non-terminal states of each trajectory.

    ``one_per_block``: one state a sequence, every block at one of its own states drawn uniformly
    (the paper). ``all``: state j of every block together, for j = 1..; blocks with fewer states are
    clean in the later ones. ``random_mask``: every position masked with a block's rate t ~ U(0, 1),
    at least one a block.
    """
    states = []
    for trajectory in trajectories:
        masks = {"one_per_block": _one_per_block, "all": _all_rounds, "random_mask": _random_mask}[
            mode
        ](trajectory, block_size, key)
        states += [
            make_state(
                trajectory.sample,
                trajectory.prompt.ids,
                trajectory.response_ids,
                mask,
                vocabulary,
                exclude_eos=exclude_eos,
            )
            for mask in masks
        ]
    return states


def make_state(
    sample: int,
    prompt_ids: list[int],
    response_ids: list[int],
    masked: list[bool],
    vocabulary: Vocabulary,
    *,
    exclude_eos: bool,
) -> State:
    """A state with its counted positions: masked, not after the first end token, nor the end token
    itself if excluded.
    """
    first_end = next(
        (i for i, token in enumerate(response_ids) if token in vocabulary.end_ids),
        len(response_ids),
    )
    last = first_end if exclude_eos else first_end + 1
    return State(
        sample=sample,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        masked=masked,
        counted=[is_masked and i < last for i, is_masked in enumerate(masked)],
        trained_tokens=min(first_end + 1, len(response_ids)),
    )


def _blocks(trajectory: Trajectory, block_size: int) -> list[slice]:
    """The response's blocks as slices of it."""
    edges, start = [], 0
    for length in block_lengths(
        len(trajectory.prompt.ids), len(trajectory.response_ids), block_size
    ):
        edges.append(slice(start, start + length))
        start += length
    return edges


def _one_per_block(
    trajectory: Trajectory, block_size: int, key: tuple[int, int]
) -> list[list[bool]]:
    mask: list[bool] = []
    blocks = _blocks(trajectory, block_size)
    starts = torch.tensor([block.start for block in blocks])
    draws = randomness.uniform(*key, trajectory.sample, starts, randomness.CHOOSE_STATE).tolist()
    for block, draw in zip(blocks, draws, strict=True):
        committed = trajectory.committed_at[block]
        passes = sorted(set(committed))
        chosen = passes[int(draw * len(passes))]
        mask += [at >= chosen for at in committed]
    return [mask]


def _all_rounds(trajectory: Trajectory, block_size: int, key: tuple[int, int]) -> list[list[bool]]:
    blocks = [trajectory.committed_at[block] for block in _blocks(trajectory, block_size)]
    passes = [sorted(set(committed)) for committed in blocks]
    rounds = max(len(p) for p in passes)
    return [
        [
            j < len(p) and at >= p[j]
            for committed, p in zip(blocks, passes, strict=True)
            for at in committed
        ]
        for j in range(rounds)
    ]


def _random_mask(trajectory: Trajectory, block_size: int, key: tuple[int, int]) -> list[list[bool]]:
    mask: list[bool] = []
    for block in _blocks(trajectory, block_size):
        rate = float(randomness.uniform(*key, trajectory.sample, block.start, randomness.MASK_RATE))
        positions = torch.arange(block.start, block.stop)
        draws = randomness.uniform(*key, trajectory.sample, positions, randomness.MASK_POSITION)
        chosen = (draws < rate).tolist()
        if not any(chosen):
            chosen[int(draws.argmin())] = True
        mask += chosen
    return [mask]


def pack(
    states: Sequence[State],
    *,
    block_size: int,
    mask_id: int,
    logit_shift: bool,
    align: int,
    device: torch.device,
) -> PackedBatch:
    """Pack states into one row each for student and teacher; rows are a multiple of ``align``
    tokens long (tensor ranks under sequence parallelism), the tail belonging to no sequence. An
    empty list gives a row of ``align`` tokens without loss."""
    student, teacher = _Row(), _Row()
    student_read: list[int] = []
    teacher_read: list[int] = []
    labels: list[int] = []
    row_weight: list[float] = []
    sequence: list[int] = []
    share: list[float] = []
    for number, state in enumerate(states):
        prompt, response = state.prompt_ids, state.response_ids
        finished = prompt + response
        start, end = first_block_start(len(prompt), block_size), len(finished)
        noisy = [mask_id if m else token for m, token in zip(state.masked, response, strict=True)]
        noisy_copy = prompt[start:] + noisy
        student_base, teacher_base = len(student.tokens), len(teacher.tokens)
        student.add(
            finished + noisy_copy,
            [*range(end), *range(start, end)],
            [True] * end + [False] * len(noisy_copy),
        )
        teacher.add(finished, list(range(end)), [True] * end)
        counted = [i for i, is_counted in enumerate(state.counted) if is_counted]
        shares = _masked_shares(state, block_size)
        for i in counted:
            position = len(prompt) + i
            student_read.append(
                student_base + _student_index(position, start, end, block_size, logit_shift)
            )
            teacher_read.append(teacher_base + position - 1)
            labels.append(response[i])
            share.append(shares[i])
        row_weight += [1.0 / len(counted) for _ in counted]
        sequence += [number] * len(counted)
    student.align(align)
    teacher.align(align)
    block = torch.tensor(student.positions) // block_size
    clean = torch.tensor(student.clean)

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PackedBatch(
        states=list(states),
        student_tokens=index(student.tokens),
        student_positions=index(student.positions),
        student_plan=two_stream_plan(
            student.lengths, block, clean, device, read=index(student_read)
        ),
        student_read=index(student_read),
        teacher_tokens=index(teacher.tokens),
        teacher_positions=index(teacher.positions),
        teacher_plan=causal_plan(
            teacher.lengths, len(teacher.tokens), device, read=index(teacher_read)
        ),
        teacher_read=index(teacher_read),
        labels=index(labels),
        row_weight=torch.tensor(row_weight, dtype=torch.float32, device=device),
        sequence=index(sequence),
        masked_share=torch.tensor(share, dtype=torch.float32, device=device),
    )


class _Row:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.clean: list[bool] = []
        self.lengths: list[int] = []

    def add(self, tokens: list[int], positions: list[int], clean: list[bool]) -> None:
        self.tokens += tokens
        self.positions += positions
        self.clean += clean
        self.lengths.append(len(tokens))

    def align(self, multiple: int) -> None:
        tail = -len(self.tokens) % multiple or (0 if self.tokens else multiple)
        if not self.lengths:
            self.lengths.append(tail)  # attention needs a sequence; nothing is read from it
        self.tokens += [0] * tail
        self.positions += [0] * tail
        self.clean += [True] * tail


def _student_index(position: int, start: int, end: int, block_size: int, logit_shift: bool) -> int:
    """Where in [prompt | clean | noisy] the student predicts ``position``: in the noisy copy, at
    the position itself; with shifted logits one before it, for a block's first position the clean
    copy's last one before the block."""
    if not logit_shift:
        return end + position - start
    return position - 1 if position % block_size == 0 else end + position - 1 - start


def _masked_shares(state: State, block_size: int) -> list[float]:
    """For each response token the share of its block's response tokens that are masked."""
    shares: list[float] = []
    start = 0
    for length in block_lengths(len(state.prompt_ids), len(state.response_ids), block_size):
        masked = sum(state.masked[start : start + length])
        shares += [masked / length] * length
        start += length
    return shares


def split_over_ranks(states: Sequence[State], ranks: int) -> list[list[State]]:
    """Share one update's sequences out so that every rank gets about the same cost (longest first,
    to the lightest).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for number in sorted(range(len(states)), key=lambda i: (-states[i].cost, i)):
        lightest = min(range(ranks), key=lambda r: (load[r], r))
        shares[lightest].append(number)
        load[lightest] += states[number].cost
    return [[states[i] for i in sorted(share)] for share in shares]


def split_into_microbatches(
    states: Sequence[State], tokens_per_microbatch: int
) -> list[list[State]]:
    """First-fit packing to a token budget (positions of the student's row); a longer sequence gets
    its own microbatch.

    At least one microbatch, empty where this rank has no work, so that every rank takes part in the
    collectives.
    """
    bins: list[list[State]] = []
    room: list[int] = []
    for state in sorted(states, key=lambda s: -s.cost):
        size = len(state.prompt_ids) + 2 * len(state.response_ids)
        fitting = next((i for i, left in enumerate(room) if left >= size), None)
        if fitting is None:
            bins.append([])
            room.append(tokens_per_microbatch)
            fitting = len(bins) - 1
        bins[fitting].append(state)
        room[fitting] -= size
    return bins or [[]]
