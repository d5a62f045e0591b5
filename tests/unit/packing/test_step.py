"""Packed rows hold exactly what the loss depends on, and every distinct sequence asks the teacher
once. That the numbers are right is in tests/distributed/test_layout_invariance.py.
"""

from dataclasses import replace

import pytest
import torch

from megatron_opdlm.diffusion.masks import branch_visible, two_stream_visible
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import StepBatches, pack_step
from megatron_opdlm.packing.student import PackedBatch, student_tokens
from megatron_opdlm.records import State
from megatron_opdlm.states import choose_states, make_state
from tests.unit.test_states import END, IDS, trajectory

PACKING = Packing(
    block_size=4,
    mask_id=IDS.mask_id,
    logit_shift=False,
    tokens_per_microbatch=1000,
    align=1,
    device=torch.device("cpu"),
)


def state(prompt: list[int], response: list[int], masked: list[int], sample: int = 0) -> State:
    return make_state(sample, prompt, response, [bool(m) for m in masked], IDS, exclude_eos=False)


def only(step: StepBatches) -> PackedBatch:
    ((batch,),) = step.updates
    return batch


# positions 0-3 | 4-7 | 8-11 | 12-15; the response starts at 6, block 2 is finished in this state
ONE = state([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [0, 1, *[0] * 4, 1, 0, 1, 0])


def test_one_row_by_hand():
    """Claim: clean up to the last counted block, noisy copies of the counted blocks alone, the
    prompt's tail repeated clean in its block."""
    batch = only(pack_step([[ONE]], PACKING))
    mask = IDS.mask_id
    first, last = [5, 6, 1, mask], [mask, 1, mask, 3]
    assert batch.student_tokens.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, *first, *last]
    assert batch.student_positions.tolist() == [*range(12), *range(4, 8), *range(12, 16)]
    assert batch.clean.tolist() == [True] * 12 + [False] * 8
    assert batch.student_read.tolist() == [15, 16, 18]
    assert batch.labels.tolist() == [2, 7, 2]
    assert batch.masked_share.tolist() == [0.5, 0.5, 0.5]
    assert batch.row_weight.tolist() == pytest.approx([1 / 3] * 3)
    assert (batch.position.tolist(), batch.place.tolist()) == ([1, 6, 8], [3, 0, 2])
    whole = only(pack_step([[ONE]], replace(PACKING, block_size=64)))  # 32 places of two tokens
    assert whole.place.tolist() == [7 // 2, 12 // 2, 14 // 2]


def test_shifted_logits_are_read_one_before():
    """Claim: a block's first position is read from the clean token before the block."""
    batch = only(pack_step([[ONE]], replace(PACKING, logit_shift=True)))
    assert batch.student_read.tolist() == [14, 11, 17]


def test_states_of_a_sequence_share_its_clean_copy():
    """Claim: each state adds a noisy copy of its counted blocks alone to one clean copy; a noisy
    token sees what it sees in a row of its own, and nothing of another copy."""
    other = state(ONE.prompt_ids, ONE.response_ids, [1, 0, *[0] * 4, 0, 1, 0, 0])
    batch = only(pack_step([[ONE, other]], PACKING))
    assert batch.lengths == [12 + 8 + 8]
    assert batch.states == [ONE, other]
    apart = [only(pack_step([[one]], PACKING)) for one in (ONE, other)]
    for name in ("labels", "row_weight", "masked_share"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(x, name) for x in apart])), name
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1]
    read = [batch.student_read[:3], batch.student_read[3:]]
    for alone, at, shared in zip(apart, (range(12, 20), range(20, 28)), read, strict=True):
        inside = torch.tensor([*range(12), *at])
        assert torch.equal(batch.student_tokens[inside], alone.student_tokens)
        assert torch.equal(batch.student_positions[inside], alone.student_positions)
        assert torch.equal(inside[alone.student_read], shared)
        assert torch.equal(seen(batch)[inside][:, inside], seen(alone))
        assert int(seen(batch)[inside].sum()) == int(seen(alone).sum())


def seen(batch: PackedBatch) -> torch.Tensor:
    block, clean = batch.block, batch.clean
    visible = two_stream_visible(block[:, None], clean[:, None], block[None], clean[None])
    branch = torch.zeros_like(block) if batch.branch is None else batch.branch
    return visible & branch_visible(branch[:, None], branch[None])


def test_states_share_no_more_than_a_microbatch_holds():
    """Claim: states that exceed a microbatch together are packed apart."""
    tight = replace(PACKING, tokens_per_microbatch=27)
    (batches,) = pack_step([[ONE, ONE]], tight).updates
    assert [batch.lengths for batch in batches] == [[20], [20]]


def test_the_teacher_reads_up_to_the_last_prediction():
    """Claim: the teacher's row ends at the token before the last counted one."""
    step = pack_step([[ONE]], PACKING)
    (asked,) = step.finished
    assert asked.tokens.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 1]
    assert asked.read.tolist() == [6, 11, 13]
    assert only(step).target.tolist() == [0, 1, 2]


def test_states_of_a_trajectory_ask_the_teacher_once():
    """Claim: with ``states.mode=all`` the teacher reads each sequence once, also over updates and
    microbatches, and every position of every state finds the row of its own prefix."""
    states = [
        one
        for sample, committed in enumerate(([1, 2, 3, 4] * 3, [2, 1, 2, 1, 2, 3, 4]))
        for one in choose_states(
            [trajectory(4 + sample, committed, sample)],
            mode="all",
            block_size=4,
            vocabulary=IDS,
            exclude_eos=False,
            key=(1, 1),
        )
    ]
    assert len(states) == 8
    small = replace(PACKING, tokens_per_microbatch=20)
    step = pack_step([states[0::3], states[1::3], states[2::3]], small)
    assert sum(sum(asked.lengths) for asked in step.finished) == (4 + 12 - 1) + (5 + 7 - 1)
    prefixes = [
        tuple(asked.tokens[read - int(asked.positions[read]) : read + 1].tolist())
        for asked in step.finished
        for read in asked.read.tolist()
    ]
    for batch in (batch for update in step.updates for batch in update):
        for row, sequence, label in zip(
            batch.target.tolist(), batch.sequence.tolist(), batch.labels.tolist(), strict=True
        ):
            one = batch.states[sequence]
            finished = tuple(one.prompt_ids + one.response_ids)
            prefix = prefixes[row]
            assert finished[: len(prefix)] == prefix and finished[len(prefix)] == label


def test_nothing_is_padded():
    """Claim: rows are as long as what they hold; a sequence without loss takes no room, one that
    is longer than the budget has a microbatch for itself, and every sequence is in one."""
    states = [
        state([1] * (1 + i % 9), [2] * (4 * i), [i % 2] * (4 * i), sample=i) for i in range(1, 12)
    ]
    budget = 60
    (batches,) = pack_step([states], replace(PACKING, tokens_per_microbatch=budget)).updates
    assert sorted(s.sample for batch in batches for s in batch.states) == list(range(1, 12))
    for batch in batches:
        sizes = [student_tokens(one, PACKING) for one in batch.states]
        assert len(batch.student_tokens) == sum(sizes) == sum(batch.lengths)
        assert len(batch.states) == 1 or sum(sizes) <= budget
    assert max(len(batch.student_tokens) for batch in batches) > budget
    assert student_tokens(states[1], PACKING) == 0


@pytest.mark.parametrize("states", [[], [state([1], [END, 2, 3], [0, 1, 1])]])
def test_rows_without_loss_still_take_part(states: list[State]):
    """Claim: without states or counted positions there is one microbatch of ``align`` tokens."""
    step = pack_step([states], replace(PACKING, align=2))
    batch = only(step)
    (asked,) = step.finished
    assert len(batch.student_tokens) == len(asked.tokens) == 2
    assert len(batch.labels) == len(batch.target) == len(asked.read) == 0
    assert batch.states == states
