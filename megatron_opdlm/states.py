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
from megatron_opdlm.diffusion.randomness import CHOOSE_STATE, MASK_POSITION, MASK_RATE
from megatron_opdlm.records import State, Trajectory, Vocabulary

_Key = tuple[int, int]  # seed, step
_DRAW_BITS = 40  # a sample's number is below 2**40; the draw stands above it


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Response tokens start to stop, and when each was committed: (rollout's block, pass)."""

    start: int
    stop: int
    turns: list[tuple[int, int]]  # empty for off-policy trajectories


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A draw of one trajectory's states."""

    blocks: list[_Block]
    sample: int  # key of its random numbers: the trajectory's sample and the draw


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
    blocks = [_blocks(trajectory, block_size, alignment) for trajectory in trajectories]
    masks: dict[int, list[list[bool]]] = {}  # of each trajectory, by its place
    for off_policy in (False, True):
        places = [i for i, t in enumerate(trajectories) if t.off_policy == off_policy]
        choose = _random_mask if off_policy else _MODES[mode]
        drawn = [
            _Drawn(blocks=blocks[i], sample=trajectories[i].sample + (draw << _DRAW_BITS))
            for i in places
            for draw in range(1 if choose is _all_rounds else draws)
        ]
        each = len(drawn) // max(len(places), 1)
        chosen = choose(drawn, key)
        for number, i in enumerate(places):
            masks[i] = list(chain.from_iterable(chosen[number * each : (number + 1) * each]))
    return [
        make_state(
            trajectory.sample,
            trajectory.prompt.ids,
            trajectory.response_ids,
            mask,
            vocabulary,
            exclude_eos=exclude_eos,
            off_policy=trajectory.off_policy,
        )
        for i, trajectory in enumerate(trajectories)
        for mask in masks[i]
    ]


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


def _one_per_block(drawn: Sequence[_Drawn], key: _Key) -> list[list[list[bool]]]:
    starts = [[block.start for block in one.blocks] for one in drawn]
    masks = []
    for one, draws in zip(drawn, _uniform(key, drawn, starts, CHOOSE_STATE), strict=True):
        mask: list[bool] = []
        for block, draw in zip(one.blocks, draws, strict=True):
            turns = sorted(set(block.turns))
            chosen = turns[int(draw * len(turns))]
            mask += [at >= chosen for at in block.turns]
        masks.append([mask])
    return masks


def _all_rounds(drawn: Sequence[_Drawn], key: _Key) -> list[list[list[bool]]]:
    return [_rounds(one.blocks) for one in drawn]


def _rounds(blocks: list[_Block]) -> list[list[bool]]:
    turns = [sorted(set(block.turns)) for block in blocks]
    return [
        [
            j < len(own) and at >= own[j]
            for block, own in zip(blocks, turns, strict=True)
            for at in block.turns
        ]
        for j in range(max(map(len, turns)))
    ]


def _random_mask(drawn: Sequence[_Drawn], key: _Key) -> list[list[list[bool]]]:
    starts = [[block.start for block in one.blocks] for one in drawn]
    positions = [range(sum(b.stop - b.start for b in one.blocks)) for one in drawn]
    rates = _uniform(key, drawn, starts, MASK_RATE)
    numbers = _uniform(key, drawn, positions, MASK_POSITION)
    masks = []
    for one, own_rates, own_numbers in zip(drawn, rates, numbers, strict=True):
        mask: list[bool] = []
        for block, rate in zip(one.blocks, own_rates, strict=True):
            draws = own_numbers[block.start : block.stop]
            least = min(draws)  # at least one a block
            mask += [draw < rate or draw == least >= rate for draw in draws]
        masks.append([mask])
    return masks


def _uniform(
    key: _Key, drawn: Sequence[_Drawn], places: Sequence[Sequence[int]], purpose: int
) -> list[list[float]]:
    """A number for each of the places of each draw, all made at once."""
    counts = torch.tensor([len(own) for own in places], dtype=torch.int64)
    samples = torch.tensor([one.sample for one in drawn], dtype=torch.int64)
    flat = torch.tensor(list(chain.from_iterable(places)), dtype=torch.int64)
    numbers = randomness.uniform(*key, samples.repeat_interleave(counts), flat, purpose)
    return [own.tolist() for own in numbers.split(counts.tolist())]


_Mode = Callable[[Sequence[_Drawn], _Key], list[list[list[bool]]]]  # the masks of each draw
_MODES: dict[str, _Mode] = {
    "one_per_block": _one_per_block,
    "all": _all_rounds,
    "random_mask": _random_mask,
}
