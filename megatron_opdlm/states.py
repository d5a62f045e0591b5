"""Trajectories -> partially denoised states.

A state is one point of a sequence's own denoising trajectory: which response tokens are still
masked. ``packing/`` makes rows of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

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
    states = []
    for trajectory in trajectories:
        blocks = _blocks(trajectory, block_size, alignment)
        choose = _random_mask if trajectory.off_policy else _MODES[mode]
        masks = (
            choose(trajectory, blocks, (*key, trajectory.sample + (draw << _DRAW_BITS)))
            for draw in range(1 if choose is _all_rounds else draws)
        )
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
            for mask in chain.from_iterable(masks)
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


def _one_per_block(trajectory: Trajectory, blocks: list[_Block], key: _Key) -> list[list[bool]]:
    mask: list[bool] = []
    starts = torch.tensor([block.start for block in blocks])
    draws = randomness.uniform(*key, starts, randomness.CHOOSE_STATE).tolist()
    for block, draw in zip(blocks, draws, strict=True):
        turns = sorted(set(block.turns))
        chosen = turns[int(draw * len(turns))]
        mask += [at >= chosen for at in block.turns]
    return [mask]


def _all_rounds(trajectory: Trajectory, blocks: list[_Block], key: _Key) -> list[list[bool]]:
    turns = [sorted(set(block.turns)) for block in blocks]
    return [
        [
            j < len(own) and at >= own[j]
            for block, own in zip(blocks, turns, strict=True)
            for at in block.turns
        ]
        for j in range(max(map(len, turns)))
    ]


def _random_mask(trajectory: Trajectory, blocks: list[_Block], key: _Key) -> list[list[bool]]:
    mask: list[bool] = []
    for block in blocks:
        rate = float(randomness.uniform(*key, block.start, randomness.MASK_RATE))
        positions = torch.arange(block.start, block.stop)
        draws = randomness.uniform(*key, positions, randomness.MASK_POSITION)
        chosen = (draws < rate).tolist()
        if not any(chosen):
            chosen[int(draws.argmin())] = True
        mask += chosen
    return [mask]


_Mode = Callable[[Trajectory, list[_Block], _Key], list[list[bool]]]
_MODES: dict[str, _Mode] = {
    "one_per_block": _one_per_block,
    "all": _all_rounds,
    "random_mask": _random_mask,
}
