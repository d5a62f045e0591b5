"""Context parallelism splits packed rows into equal shares that lose nothing. That losses and
gradients do not change is in tests/distributed/test_layout_invariance.py.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_opdlm.diffusion.masks import two_stream_visible
from megatron_opdlm.model.flops import packed_row_pairs
from megatron_opdlm.model.row_split import split_row
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import StepBatches, pack_step
from megatron_opdlm.packing.student import PackedBatch
from megatron_opdlm.records import State
from megatron_opdlm.reporting import accounting
from megatron_opdlm.states import make_state
from tests.unit.model_files.test_names import SHAPE
from tests.unit.packing.test_step import PACKING
from tests.unit.test_states import IDS

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 8])


@cache
def realistic_states(count: int = 40) -> list[State]:
    """Prompts of 20 to 400 tokens, responses of 8 to 1,500 (log-normal), a share of 30 to 100 % of
    each block's last positions masked."""
    generator = torch.Generator().manual_seed(3)
    states = []
    for sample in range(count):
        prompt = int(torch.randint(20, 400, (1,), generator=generator))
        spread = float(torch.randn(1, generator=generator))
        blocks = int(min(375, max(2, 60 * 2.7**spread)))
        masked = (torch.rand(blocks, generator=generator) * 3).long().tolist()
        mask = [i >= first for first in masked for i in range(4)]
        fill = -prompt % 4  # the response begins in the prompt's last block
        ids = torch.randint(9, (fill + 4 * blocks,), generator=generator).tolist()
        response = [token if token not in IDS.end_ids else 3 for token in ids]
        mask = [True] * fill + mask
        states.append(make_state(sample, [1] * prompt, response, mask, IDS, exclude_eos=False))
    return states


def of_rank(rank: int, ranks: int, packing: Packing) -> StepBatches:
    shared = replace(packing, context_ranks=ranks, context_rank=rank)
    states = realistic_states()
    return pack_step([states[:25], states[25:]], shared)


def rows(step: StepBatches) -> list[PackedBatch]:
    return [batch for batches in step.updates for batch in batches]


@RANKS
def test_shares_are_equal(ranks: int):
    """Claim: on realistic rows every rank has the same number of tokens and, to within one, of
    positions that are projected to the vocabulary; all attend under the whole mask."""
    packing = replace(PACKING, tokens_per_microbatch=8192, align=2)
    steps = [of_rank(rank, ranks, packing) for rank in range(ranks)]
    assert len(rows(steps[0])) > 3
    for same in zip(*map(rows, steps), strict=True):
        assert len({len(batch.student_tokens) for batch in same}) == 1
        assert len(same[0].student_tokens) % packing.align == 0
        counted = [len(batch.labels) for batch in same]
        assert max(counted) - min(counted) <= 1
        assert sum(counted) > 500
        assert len({(tuple(batch.lengths), len(batch.block)) for batch in same}) == 1
    for same in zip(*(step.finished for step in steps), strict=True):
        assert len({len(asked.tokens) for asked in same}) == 1
        assert max(len(asked.read) for asked in same) == same[0].most
        assert sum(len(asked.read) for asked in same) > (same[0].most - 1) * ranks


@RANKS
def test_shares_are_the_row(ranks: int):
    """Claim: put together by ``shares``, the ranks' tokens, positions and reads are the whole
    row's, with its labels and weights."""
    packing = replace(PACKING, tokens_per_microbatch=4096, logit_shift=True)
    wholes = rows(of_rank(0, 1, replace(packing, align=ranks)))
    parts = zip(*(rows(of_rank(rank, ranks, packing)) for rank in range(ranks)), strict=True)
    for whole, same in zip(wholes, parts, strict=True):
        order = same[0].split.order
        for name in ("student_tokens", "student_positions"):
            joined = torch.cat([getattr(batch, name) for batch in same])
            assert torch.equal(joined[order], getattr(whole, name))
        read = [b.split.of_rank(rank)[b.student_read] for rank, b in enumerate(same)]
        found = torch.cat(read).argsort()
        expected = whole.student_read.argsort()
        for name in ("labels", "row_weight", "sequence", "masked_share"):
            joined = torch.cat([getattr(batch, name) for batch in same])
            assert torch.equal(joined[found], getattr(whole, name)[expected])
        assert torch.equal(torch.cat(read)[found], whole.student_read[expected])


@RANKS
def test_each_rank_keeps_the_targets_that_it_asks_for(ranks: int):
    """Claim: of what the context ranks of the teacher computed, a rank keeps the rows of its own
    counted positions and no others, whichever rank computed them."""
    packing = replace(PACKING, tokens_per_microbatch=4096, share_teacher=False)
    steps = [of_rank(rank, ranks, packing) for rank in range(ranks)]
    for step in (steps[0], steps[-1]):
        targets = []  # (position, next token) stand for a hidden state
        for number, asked in enumerate(step.finished):
            gathered = torch.full((ranks * asked.most, 2), -1)
            for rank, other in enumerate(steps):
                batch = other.finished[number]
                position = batch.positions[batch.read]
                after = _next_tokens(other, number, batch.split.of_rank(rank)[batch.read], steps)
                first = rank * asked.most
                gathered[first : first + len(position)] = torch.stack([position, after], dim=1)
            targets.append(gathered[asked.wanted])
        kept = torch.cat(targets)
        used = torch.cat([batch.target for batch in rows(step)])
        assert len(kept) == len(used.unique()) and int(kept.min()) >= 0
        for batch in rows(step):
            position = batch.student_positions[batch.student_read]
            found = kept[batch.target]
            assert torch.equal(found[:, 0], position - 1)
            assert torch.equal(found[:, 1], batch.labels)


def _next_tokens(
    step: StepBatches, number: int, place: torch.Tensor, steps: list[StepBatches]
) -> torch.Tensor:
    """What follows each place in the finished sequence; the row ends one token before the last."""
    asked = [one.finished[number] for one in steps]
    whole = torch.cat([one.tokens for one in asked])[asked[0].split.order]
    finished = [tuple(s.prompt_ids + s.response_ids) for s in realistic_states()]
    ends = torch.tensor(asked[0].lengths).cumsum(0).tolist()
    after = torch.roll(whole, -1)
    for start, end in zip([0, *ends], ends, strict=False):
        head = tuple(whole[start:end].tolist())
        after[end - 1] = next(s[len(head)] for s in finished if s[: len(head)] == head)
    return after[place]


def operations(step: StepBatches) -> tuple[float, float]:
    """Of the student's microbatches and of the teacher's rows."""
    student = [
        accounting.student_flops(SHAPE, batch, recompute="true", sequence_parallel=False)
        for batch in rows(step)
    ]
    teacher = [
        accounting.teacher_flops(SHAPE, asked, sequence_parallel=False) for asked in step.finished
    ]
    return sum(student), sum(teacher)


@RANKS
def test_operations_of_the_ranks_are_those_of_the_row(ranks: int):
    """Claim: summed over the context ranks nothing is counted twice, and each has its share."""
    packing = replace(PACKING, tokens_per_microbatch=4096)
    whole = operations(of_rank(0, 1, replace(packing, align=ranks)))
    parts = [operations(of_rank(rank, ranks, packing)) for rank in range(ranks)]
    for expected, *found in zip(whole, *parts, strict=True):
        assert sum(found) == pytest.approx(expected, rel=1e-12)
        assert max(found) < 1.01 * expected / ranks


def test_kernels_that_skip_hidden_pairs_count_visible_ones():
    """Claim: the pairs counted for them are those that the mask's predicate shows, by enumeration;
    a bias is added to all, and chunks of long sequences lie between."""
    packed = rows(of_rank(0, 1, replace(PACKING, tokens_per_microbatch=4096)))
    batch = max(packed, key=lambda batch: len(batch.lengths))
    lengths = torch.tensor(batch.lengths)
    assert len(lengths) > 2
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    n = len(document)
    block, clean = batch.block[:n], batch.clean[:n]
    visible = two_stream_visible(block[:, None], clean[:, None], block[None], clean[None])
    same = document[:, None] == document[None]
    branch = torch.zeros(n) if batch.branch is None else batch.branch[:n]
    visible &= (branch[None] < 0) | (branch[:, None] == branch[None])
    row = batch.lengths, batch.block, batch.clean, batch.branch
    seen = packed_row_pairs("flex", *row)
    assert seen == int((visible & same).sum())
    assert packed_row_pairs("te", *row) >= int(same.sum())
    assert seen < packed_row_pairs("dense", *row) < 0.6 * packed_row_pairs("te", *row)
    causal = [3, 1, 4]
    assert packed_row_pairs("te", causal) == packed_row_pairs("flex", causal) == 6 + 1 + 10
    assert packed_row_pairs("dense", causal) >= 9 + 1 + 16


def test_one_rank_exchanges_nothing():
    """Claim: a row of one rank is in packed order."""
    split = split_row(6, torch.tensor([4, 5]), 1)
    assert split.shares.tolist() == split.order.tolist() == list(range(6))


def test_split_by_hand():
    """Claim: reads 2, 3, 4 of 6 tokens go two to the first rank and one to the second; the others
    fill the shares up."""
    split = split_row(6, torch.tensor([4, 2, 3]), 2)
    assert split.of_rank(0).tolist() == [0, 2, 3]
    assert split.of_rank(1).tolist() == [1, 4, 5]
    assert split.shares[split.order].tolist() == list(range(6))
