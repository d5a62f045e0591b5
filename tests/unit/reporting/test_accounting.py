"""What a step's numbers say of states in which nothing can be learned."""

from megatron_opdlm.records import Prompt, Trajectory, Vocabulary
from megatron_opdlm.reporting import accounting
from megatron_opdlm.states import choose_states

END, MASK = 9, 11
IDS = Vocabulary(size=12, mask_id=MASK, end_ids=(END,), pad_id=0, forbidden_ids=(MASK,))


def trajectory(sample: int, prompt: list[int], response: list[int]) -> Trajectory:
    return Trajectory(
        sample=sample,
        prompt=Prompt(index=sample, ids=prompt),
        response_ids=response,
        committed_at=[1] * len(response),
        response_tokens=1,
        finish_reason="stop",
        forwards=2,
        passes=1,
    )


def counts(*trajectories: Trajectory, exclude_eos: bool) -> dict[str, int]:
    states = choose_states(
        trajectories,
        mode="one_per_block",
        block_size=4,
        vocabulary=IDS,
        exclude_eos=exclude_eos,
        key=(0, 1),
    )
    return accounting.state_counts(states, mask_id=MASK)


def test_sequences_without_a_counted_position_are_counted():
    """Claim: with loss.exclude_eos a response that ends at once has nothing under loss; it is
    counted, and a step of nothing else has a note, others none."""
    empty, full = trajectory(0, [1, 2], [END, 0]), trajectory(1, [1, 2], [3, END])
    mixed = counts(empty, full, exclude_eos=True)
    assert (mixed["sequences"], mixed["sequences_without_loss"]) == (2, 1)
    assert accounting.nothing_to_learn(mixed) == ""
    nothing = counts(empty, exclude_eos=True)
    assert (nothing["loss_tokens"], nothing["sequences_without_loss"]) == (0, 1)
    assert "no sequence with a position under loss" in accounting.nothing_to_learn(nothing)
    assert counts(empty, exclude_eos=False)["sequences_without_loss"] == 0


def test_sequences_with_mask_tokens_that_are_no_noise_are_counted():
    """Claim: in the prompt or in a recorded response, once a sequence."""
    clean, prompt = trajectory(0, [1, 2], [3, END]), trajectory(1, [MASK, MASK], [3, END])
    recorded = trajectory(2, [1, 2], [MASK, END])
    found = counts(clean, prompt, recorded, exclude_eos=False)
    assert found["sequences_with_mask_token"] == 2
