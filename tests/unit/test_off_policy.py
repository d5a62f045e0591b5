"""Recorded responses: how many take the place of generated ones, and as what."""

import pytest

from megatron_opdlm.config import MixingConfig
from megatron_opdlm.curriculum import off_policy_fraction
from megatron_opdlm.errors import InputError
from megatron_opdlm.off_policy import is_off_policy, recorded_trajectory, require_responses
from megatron_opdlm.records import Prompt
from megatron_opdlm.states import choose_states
from tests.unit.test_states import END, IDS


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.25, 0.5, 0.9, 1.0])
def test_every_run_of_neighbours_has_its_share(fraction: float):
    """Claim: any n neighbours hold n f recorded ones to within one, in every step, and the mean
    over steps is f."""
    total = 0
    for step in range(200):
        chosen = is_off_policy(24, fraction, (3, step))
        assert chosen == is_off_policy(24, fraction, (3, step))
        total += sum(chosen)
        for first in range(24):
            for last in range(first + 1, 25):
                assert abs(sum(chosen[first:last]) - (last - first) * fraction) < 1 + 1e-9
    assert total / (200 * 24) == pytest.approx(fraction, abs=0.004)


def test_which_samples_are_recorded_changes_from_step_to_step():
    """Claim: no sample is always or never a recorded one."""
    steps = [is_off_policy(8, 0.25, (3, step)) for step in range(60)]
    assert all(0 < sum(column) < 60 for column in zip(*steps, strict=True))


def test_schedule():
    """Claim: constant stays; the others go from one fraction to the other and stay there."""
    assert {off_policy_fraction(s, MixingConfig(fraction=0.3)) for s in (1, 9)} == {0.3}
    falling = MixingConfig(fraction=0.8, end_fraction=0.2, kind="linear", steps=4)
    found = [off_policy_fraction(step, falling) for step in (1, 2, 4, 5, 100)]
    assert found == pytest.approx([0.65, 0.5, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("response", "limit", "expected", "shown", "reason"),
    [
        # P = 6, B = 4: blocks end after response tokens 2, 6, 10
        ([1, 2, 3, 4], 10, [1, 2, 3, 4, END, 0], 5, "stop"),
        ([1, 2, 3, END], 10, [1, 2, 3, END, 0, 0], 4, "stop"),
        ([1, END, 3, 4, 5, 6, 7], 10, [1, END], 2, "stop"),
        ([1, 2, 3, 4, 5], 10, [1, 2, 3, 4, 5, END], 6, "stop"),
        ([1, 2, 3, 4, 5, 6], 10, [1, 2, 3, 4, 5, 6, END, 0, 0, 0], 7, "stop"),
        ([1, 2, 3, 4, 5, 6], 5, [1, 2, 3, 4, 5, 6], 5, "length"),
        ([1, 2, 3, 4, 5, 6, 7], 2, [1, 2], 2, "length"),
        ([], 2, [END, 0], 1, "stop"),
    ],
)
def test_recorded_trajectory(
    response: list[int], limit: int, expected: list[int], shown: int, reason: str
):
    """Claim: whole blocks through the end token or through the limit's block; an end token is added
    where there is none, then pads."""
    prompt = Prompt(index=0, ids=[5] * 6, response_ids=response)
    made = recorded_trajectory(3, prompt, limit, 4, IDS)
    assert (made.response_ids, made.response_tokens, made.finish_reason) == (
        expected,
        shown,
        reason,
    )
    assert made.off_policy and made.forwards == made.passes == 0


@pytest.mark.parametrize("mode", ["one_per_block", "all"])
def test_states_of_recorded_responses_are_random_masks(mode: str):
    """Claim: whatever the mode, one state of random masks, the same as ``random_mask`` makes;
    nothing after the end token counts."""
    prompt = Prompt(index=0, ids=[5] * 6, response_ids=[1, 2, 3, 4])
    made = recorded_trajectory(3, prompt, 10, 4, IDS)
    found, expected = (
        choose_states(
            [made], mode=name, block_size=4, vocabulary=IDS, exclude_eos=False, key=(1, 2)
        )
        for name in (mode, "random_mask")
    )
    assert found == expected and len(found) == 1
    assert found[0].off_policy and not found[0].counted[5]


def test_a_row_without_a_response_is_an_error():
    rows = [Prompt(index=i, ids=[1], response_ids=[2] if i % 3 else None) for i in range(1, 8)]
    require_responses(rows[:2], "data.path=f.jsonl")
    with pytest.raises(InputError, match=r"f\.jsonl: 2 of 7 usable .* row 3 .*mixing\.path"):
        require_responses(rows, "data.path=f.jsonl")
