"""Trajectories -> partially denoised states.

A state is one point of a sequence's own denoising trajectory: which response tokens are still
masked. ``packing.py`` makes rows of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.blocks import block_lengths
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
    off_policy: bool = False  # the response was recorded, not generated


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
    at least one a block. Off-policy trajectories, which no passes made, always get ``random_mask``.
    """
    states = []
    for trajectory in trajectories:
        choose = _random_mask if trajectory.off_policy else _MODES[mode]
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
            for mask in choose(trajectory, block_size, key)
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


_MODES = {"one_per_block": _one_per_block, "all": _all_rounds, "random_mask": _random_mask}
