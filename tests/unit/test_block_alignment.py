"""``states.block_alignment=response`` rebuilds the public reference's training rows.

Expected values are written down from the reference's description: blocks counted from the
response's start (the prompt's blocks end there), passes numbered over the whole response, and a
mask by block numbers and copies. No function of the project's packing takes part in them.
"""

import random
from dataclasses import replace

import pytest

from megatron_opdlm.diffusion.masks import two_stream_visible
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.packing.student import PackedBatch, student_tokens
from megatron_opdlm.records import Prompt, State, Trajectory
from megatron_opdlm.states import choose_states
from tests.unit.packing.test_step import PACKING
from tests.unit.test_states import IDS

RESPONSE = replace(PACKING, alignment="response")
B = PACKING.block_size


def rollout(prompt_tokens: int, blocks: int, seed: int) -> Trajectory:
    """A response that the engine could have made: whole absolute blocks, random passes in each."""
    rng = random.Random(seed)
    first = B - prompt_tokens % B
    committed: list[int] = []
    for size in [first, *[B] * (blocks - 1)]:
        passes = rng.randint(1, size)
        committed += rng.sample(
            [*range(1, passes + 1), *rng.choices(range(1, passes + 1), k=size)][:size], size
        )
    count = len(committed)
    return Trajectory(
        sample=seed,
        prompt=Prompt(index=0, ids=[rng.randint(1, 7) for _ in range(prompt_tokens)]),
        response_ids=[rng.randint(1, 7) for _ in range(count)],
        committed_at=committed,
        response_tokens=count,
        finish_reason="length",
        forwards=0,
        passes=0,
    )


def global_steps(trajectory: Trajectory) -> list[int]:
    """Passes numbered over the whole response: those of a block come after all of the blocks before
    it."""
    prompt, steps, before = len(trajectory.prompt.ids), [], 0
    for i, passes in enumerate(trajectory.committed_at):
        if i and (prompt + i) % B == 0:
            before += 100
        steps.append(before + passes)
    return steps


def reachable(trajectory: Trajectory) -> list[set[tuple[bool, ...]]]:
    """Of each response-aligned block: every mask `steps >= v`, v one of its distinct steps."""
    steps = global_steps(trajectory)
    blocks = [steps[i : i + B] for i in range(0, len(steps), B)]
    return [{tuple(at >= v for at in block) for v in block} for block in blocks]


def chosen(trajectory: Trajectory, step: int, mode: str = "one_per_block") -> list[State]:
    return choose_states(
        [trajectory],
        mode=mode,
        block_size=B,
        vocabulary=IDS,
        exclude_eos=False,
        key=(3, step),
        alignment="response",
    )


def slices(masked: list[bool]) -> list[tuple[bool, ...]]:
    return [tuple(masked[i : i + B]) for i in range(0, len(masked), B)]


@pytest.mark.parametrize("prompt_tokens", [1, 2, 3, 4, 5, 7])
def test_states_are_those_of_blocks_that_start_with_the_response(prompt_tokens):
    """Claim: over many draws, the masks of every block are exactly the reachable ones."""
    trajectory = rollout(prompt_tokens, 3, seed=prompt_tokens)
    seen: list[set[tuple[bool, ...]]] = [set() for _ in reachable(trajectory)]
    for step in range(120):
        (state,) = chosen(trajectory, step)
        for masks, mask in zip(seen, slices(state.masked), strict=True):
            masks.add(mask)
    assert seen == reachable(trajectory)


def test_all_rounds_walk_through_every_state():
    trajectory = rollout(3, 3, seed=5)
    seen: list[set[tuple[bool, ...]]] = [set() for _ in reachable(trajectory)]
    for state in chosen(trajectory, 0, "all"):
        for masks, mask in zip(seen, slices(state.masked), strict=True):
            if any(mask):
                masks.add(mask)
    assert seen == reachable(trajectory)


def expected_row(state: State) -> list[tuple[int, int, int, bool]]:
    """(token, position, block, clean) of the whole row: prompt, clean and noisy response."""
    prompt, tokens = len(state.prompt_ids), state.prompt_ids + state.response_ids
    clean = [(token, i, (i - prompt) // B, True) for i, token in enumerate(tokens)]
    noisy = [
        (IDS.mask_id if masked else token, prompt + i, i // B, False)
        for i, (token, masked) in enumerate(zip(state.response_ids, state.masked, strict=True))
    ]
    return clean + noisy


def seen_by(row: list[tuple[int, int, int, bool]], query: tuple[int, int, int, bool]) -> set:
    """What a token of the row attends to, by the reference's three rules."""
    _, _, own, clean = query
    return {
        key
        for key in row
        if (key[3] and (key[2] < own or (clean and key[2] == own)))
        or (not key[3] and not clean and key[2] == own)
    }


def packed_view(batch: PackedBatch, query: int, offset: int) -> set:
    """What a token of the packed row attends to, as (token, position, block, clean)."""
    block, clean = batch.block, batch.clean
    visible = two_stream_visible(block[query], clean[query], block, clean)
    return {
        (
            int(batch.student_tokens[i]),
            int(batch.student_positions[i]),
            int(block[i]) - offset,
            bool(clean[i]),
        )
        for i in visible.nonzero().flatten().tolist()
    }


@pytest.mark.parametrize("prompt_tokens", range(1, 9))
def test_a_packed_row_attends_as_the_whole_row_would(prompt_tokens):
    """Claim: every position under loss sees exactly the tokens, at the positions, that it sees in
    the reference's full row; and the row has the length that sharing out counts with."""
    for seed in range(6):
        trajectory = rollout(prompt_tokens, 3, seed)
        (state,) = chosen(trajectory, seed)
        ((batch,),) = pack_step([[state]], RESPONSE).updates
        row, offset = expected_row(state), -(-prompt_tokens // B)
        counted = [i for i, yes in enumerate(state.counted) if yes]
        assert batch.labels.tolist() == [state.response_ids[i] for i in counted]
        assert len(batch.student_tokens) == student_tokens(state, RESPONSE)
        for i, read in zip(counted, batch.student_read.tolist(), strict=True):
            query = (IDS.mask_id, prompt_tokens + i, i // B, False)
            assert packed_view(batch, read, offset) == seen_by(row, query)


def test_masked_shares_are_those_of_the_same_blocks():
    trajectory = rollout(2, 3, seed=1)
    (state,) = chosen(trajectory, 4)
    ((batch,),) = pack_step([[state]], RESPONSE).updates
    expected = [
        sum(block) / len(block) for block in slices(state.masked) for counted in block if counted
    ]
    assert batch.masked_share.tolist() == pytest.approx(expected)


def test_prompts_of_whole_blocks_are_the_same_either_way():
    """Claim: the two rules differ only where the prompt ends inside a block."""
    trajectory = rollout(8, 3, seed=2)
    (state,) = chosen(trajectory, 1)
    ((ours,),), ((theirs,),) = (pack_step([[state]], p).updates for p in (PACKING, RESPONSE))
    assert ours.student_tokens.tolist() == theirs.student_tokens.tolist()
    assert ours.block.tolist() == theirs.block.tolist()
    other = chosen(rollout(7, 3, seed=2), 1)
    ((ours,),), ((theirs,),) = (pack_step([other], p).updates for p in (PACKING, RESPONSE))
    assert ours.block.tolist() != theirs.block.tolist()
