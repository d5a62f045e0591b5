"""States of a trajectory (DESIGN 4b): which are chosen, what counts in them. That they are what the
rollout saw is in tests/parity/test_on_policy.py.
"""

from collections import Counter

import pytest
import torch

from megatron_opdlm.records import Prompt, Trajectory, Vocabulary
from megatron_opdlm.states import choose_states, make_state

END = 9
IDS = Vocabulary(size=12, mask_id=11, end_ids=(END, 8), pad_id=0, forbidden_ids=(11,))


def trajectory(prompt_tokens: int, committed_at: list[int], sample: int = 0) -> Trajectory:
    response = [1 + i % 7 for i in range(len(committed_at))]
    return Trajectory(
        sample=sample,
        prompt=Prompt(index=0, ids=[5] * prompt_tokens),
        response_ids=response,
        committed_at=committed_at,
        response_tokens=len(response),
        finish_reason="length",
        forwards=0,
        passes=0,
    )


def masks(mode: str, one: Trajectory, key: tuple[int, int] = (1, 1)) -> list[list[int]]:
    states = choose_states(
        [one], mode=mode, block_size=4, vocabulary=IDS, exclude_eos=False, key=key
    )
    return [[int(m) for m in state.masked] for state in states]


# P = 6: the first block holds two response tokens. Then a block of 3 passes, one of 1, one of 4.
COMMITTED = [2, 1, *(1, 3, 2, 1), *(1, 1, 1, 1), *(4, 2, 1, 3)]
BLOCKS = [slice(0, 2), slice(2, 6), slice(6, 10), slice(10, 14)]


def test_all_states_are_the_rounds_of_every_block():
    """Claim: a block with m distinct passes has m states; state j masks what pass j or a later one
    committed; a block that has no state j is clean there."""
    assert masks("all", trajectory(6, COMMITTED)) == [
        [1, 1, *(1, 1, 1, 1), *(1, 1, 1, 1), *(1, 1, 1, 1)],
        [1, 0, *(0, 1, 1, 0), *(0, 0, 0, 0), *(1, 1, 0, 1)],
        [0, 0, *(0, 1, 0, 0), *(0, 0, 0, 0), *(1, 0, 0, 1)],
        [0, 0, *(0, 0, 0, 0), *(0, 0, 0, 0), *(1, 0, 0, 0)],
    ]


def test_passes_without_a_number_in_between_are_no_states():
    """Claim: only passes that committed something make states."""
    assert masks("all", trajectory(4, [1, 7, 7, 3])) == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]


def test_one_per_block_draws_each_state_equally_often_and_independently():
    """Claim: over samples every state of a block comes with frequency 1/m (within 5 standard
    deviations), and blocks are independent; the draw depends on the key alone."""
    rounds = masks("all", trajectory(6, COMMITTED))
    count, seen = 1200, Counter()
    for sample in range(count):
        one = trajectory(6, COMMITTED, sample)
        (mask,) = masks("one_per_block", one)
        assert [mask] == masks("one_per_block", one)
        chosen = []
        for block in BLOCKS:
            states = [r[block] for r in rounds if any(r[block])]
            chosen.append(states.index(mask[block]))
        seen[tuple(chosen)] += 1
    states_of = (2, 3, 1, 4)
    assert len(seen) == 2 * 3 * 1 * 4
    for number, states in enumerate(states_of):
        for state in range(states):
            share = sum(n for chosen, n in seen.items() if chosen[number] == state)
            deviation = (count * (1 / states) * (1 - 1 / states)) ** 0.5
            assert abs(share - count / states) <= 5 * deviation
    expected = count / 24
    assert all(abs(n - expected) < 5 * expected**0.5 for n in seen.values())


def test_random_mask_masks_some_of_every_block_at_a_uniform_rate():
    """Claim: at least one token a block, never a prompt token, and on average the share that
    t ~ U(0, 1) with at least one of B masked gives: 1/2 + 1 / (B (B + 1))."""
    total, tokens = torch.zeros(14), 0
    for sample in range(500):
        (mask,) = masks("random_mask", trajectory(6, COMMITTED, sample))
        assert all(any(mask[block]) for block in BLOCKS)
        total += torch.tensor(mask)
        tokens += 1
    for block, size in zip(BLOCKS, (2, 4, 4, 4), strict=True):
        expected = 0.5 + 1 / (size * (size + 1))
        assert float(total[block].mean()) / tokens == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("response", "exclude_eos", "counted", "trained"),
    [
        ([1, 2, 3, 4], False, [1, 0, 1, 1], 4),
        ([1, 2, END, 4], False, [1, 0, 1, 0], 3),
        ([1, 2, END, 4], True, [1, 0, 0, 0], 3),
        ([1, 2, 8, END], False, [1, 0, 1, 0], 3),
        ([END, END, 3, 4], False, [1, 0, 0, 0], 1),
        ([END, 2, 3, 4], True, [0, 0, 0, 0], 1),
    ],
)
def test_counted_positions(
    response: list[int], exclude_eos: bool, counted: list[int], trained: int
):
    """Claim: masked positions through the first end token of any kind, it itself unless excluded;
    trained tokens run through it, masked or not."""
    masked = [True, False, True, True]
    state = make_state(3, [END, 1], response, masked, IDS, exclude_eos=exclude_eos)
    assert [int(c) for c in state.counted] == counted
    assert state.trained_tokens == trained


def test_every_draw_of_a_trajectory_is_one_of_its_own():
    """Claim: the first of several draws is the one of a single draw, further ones differ from it
    and from another sample's; ``all`` draws nothing."""
    one, options = trajectory(6, COMMITTED), {"vocabulary": IDS, "exclude_eos": False}
    for mode in ("one_per_block", "random_mask"):
        several = choose_states([one], mode=mode, block_size=4, key=(1, 1), draws=3, **options)
        found = [[int(m) for m in state.masked] for state in several]
        assert found[0] == masks(mode, one)[0]
        assert found[1:] != [masks(mode, trajectory(6, COMMITTED, sample))[0] for sample in (1, 2)]
        assert len(set(map(tuple, found))) == 3
    assert len(choose_states([one], mode="all", block_size=4, key=(1, 1), draws=3, **options)) == 4
