"""Trajectories -> partially denoised states.

A state is one point of a sequence's own denoising trajectory: which response tokens are still
masked. ``packing/`` makes rows of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

import torch

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.blocks import block_lengths, block_shift
from megatron_opdlm.records import State, Trajectory, Vocabulary

_Key = tuple[int, int, int]  # seed, step, sample and draw
_DRAW_BITS = 40  # a sample's number is below 2**40; the draw stands above it


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Response tokens start to stop, and when each was committed: (rollout's block, pass)."""

    start: int
    stop: int
    turns: list[tuple[int, int]]  # empty for off-policy trajectories


class _Asked(NamedTuple):
    """One choice of states: of which blocks, how, and the number that its draws are keyed by."""

    trajectory: Trajectory
    blocks: list[_Block]
    mode: str
    number: int


def choose_states(
    trajectories: Sequence[Trajectory],
    *,
    mode: str,
    block_size: int,
    vocabulary: Vocabulary,
    exclude_eos: bool,
    key: tuple[int, int],
    alignment: str = "absolute",
    draws: int = 1,
) -> list[State]:
    """Non-terminal states of each trajectory, those of one trajectory next to each other.

    ``one_per_block``: one state a sequence, every block at one of its own states drawn uniformly
    (the paper). ``all``: state j of every block together, for j = 1..; blocks with fewer states are
    clean in the later ones. ``random_mask``: every position masked with a block's rate t ~ U(0, 1),
    at least one a block. Off-policy trajectories, which no passes made, always get ``random_mask``.
    What is drawn is drawn ``draws`` times, independently.
    ``alignment`` response: blocks that mix two blocks of the rollout, as the public reference has
    them; the passes of the earlier one come first.
    """
    asked: list[_Asked] = []
    for trajectory in trajectories:
        blocks = _blocks(trajectory, block_size, alignment)
        own = "random_mask" if trajectory.off_policy else mode
        asked += [
            _Asked(trajectory, blocks, own, trajectory.sample + (draw << _DRAW_BITS))
            for draw in range(1 if own == "all" else draws)
        ]
    states = []
    for one, draw in zip(asked, _draws_of_blocks(asked, key), strict=True):
        trajectory = one.trajectory
        if one.mode == "one_per_block":
            masks = [_one_per_block(one.blocks, draw)]
        elif one.mode == "all":
            masks = _all_rounds(one.blocks)
        else:
            masks = [_random_mask(one.blocks, (*key, one.number))]
        states += [
            make_state(
                trajectory.sample,
                trajectory.prompt.ids,
                trajectory.response_ids,
                mask,
                vocabulary,
                exclude_eos=exclude_eos,
                off_policy=trajectory.off_policy,
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
    off_policy: bool = False,
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
        off_policy=off_policy,
    )


def _blocks(trajectory: Trajectory, block_size: int, alignment: str) -> list[_Block]:
    """The response's blocks."""
    prompt, response = len(trajectory.prompt.ids), len(trajectory.response_ids)
    shift = block_shift(prompt, block_size, alignment)
    ends = list(accumulate(block_lengths(prompt, response, block_size, shift)))
    # Passes are numbered within the rollout's blocks, which are finished one after the other.
    turns = [
        ((prompt + i) // block_size, passes) for i, passes in enumerate(trajectory.committed_at)
    ]
    return [
        _Block(start=start, stop=stop, turns=turns[start:stop])
        for start, stop in zip([0, *ends], ends, strict=False)
    ]


def _draws_of_blocks(asked: Sequence[_Asked], key: tuple[int, int]) -> list[list[float]]:
    """A number in [0, 1) for each block of those that need one, all of them at once."""
    blocks = [one.blocks if one.mode == "one_per_block" else [] for one in asked]
    numbers = [one.number for one, own in zip(asked, blocks, strict=True) for _ in own]
    starts = [block.start for own in blocks for block in own]
    keys = torch.tensor([numbers, starts], dtype=torch.int64)
    draws = iter(randomness.uniform(*key, *keys, randomness.CHOOSE_STATE).tolist())
    return [list(islice(draws, len(own))) for own in blocks]


def _one_per_block(blocks: list[_Block], draws: list[float]) -> list[bool]:
    mask: list[bool] = []
    for block, draw in zip(blocks, draws, strict=True):
        turns = sorted(set(block.turns))
        chosen = turns[int(draw * len(turns))]
        mask += [at >= chosen for at in block.turns]
    return mask


def _all_rounds(blocks: list[_Block]) -> list[list[bool]]:
    turns = [sorted(set(block.turns)) for block in blocks]
    return [
        [
            j < len(own) and at >= own[j]
            for block, own in zip(blocks, turns, strict=True)
            for at in block.turns
        ]
        for j in range(max(map(len, turns)))
    ]


def _random_mask(blocks: list[_Block], key: _Key) -> list[bool]:
    mask: list[bool] = []
    for block in blocks:
        rate = float(randomness.uniform(*key, block.start, randomness.MASK_RATE))
        positions = torch.arange(block.start, block.stop)
        draws = randomness.uniform(*key, positions, randomness.MASK_POSITION)
        chosen = (draws < rate).tolist()
        if not any(chosen):
            chosen[int(draws.argmin())] = True
        mask += chosen
    return mask
