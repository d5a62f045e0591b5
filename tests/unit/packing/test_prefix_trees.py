"""Responses to one prompt are packed as a tree, from which every sequence can be read again. That
losses and gradients are those of the sequences alone is in
tests/distributed/test_layout_invariance.py, whose rollout has a prompt with three responses.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_opdlm.diffusion.masks import TRUNK
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.packing.student import student_tokens
from megatron_opdlm.records import State
from megatron_opdlm.states import make_state
from tests.unit.packing.test_step import PACKING
from tests.unit.test_states import IDS

PROMPT = [*range(1, 15)]  # three whole blocks and two tokens
APART = replace(PACKING, share_student=False, share_teacher=False)


def states() -> list[State]:
    """Three responses to a prompt, of which two begin alike, and others to a prompt that begins
    like it, and to a short one."""
    responses = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8], [9, 2, 3, 4, 5, 6, 7, 1, 2, 3]]
    made = [(PROMPT, response) for response in responses]
    made += [(PROMPT[:-1], responses[0]), ([5, 6], [1] * 9), ([5, 6], [2] * 9)]
    return [
        make_state(
            i, prompt, reply, [k % 3 != 1 for k in range(len(reply))], IDS, exclude_eos=False
        )
        for i, (prompt, reply) in enumerate(made)
    ]


def paths(branch: Tensor | None, lengths: list[int]) -> list[Tensor]:
    """Packed places of every sequence of a row."""
    found, start = [], 0
    for length in lengths:
        place = torch.arange(start, start + length)
        own = torch.zeros(length) if branch is None else branch[place]
        found += [place[(own == TRUNK) | (own == number)] for number in range(int(own.max()) + 1)]
        start += length
    return found


def row(packing: Packing) -> dict[int, tuple[list[int], ...]]:
    """Of each state: tokens, positions, blocks and cleanness of its sequence, and the tokens at
    the places that are read, with the targets' own prefixes."""
    step = pack_step([states()], packing)
    asked = {
        tuple(one.tokens[path[path <= read]].tolist())
        for one in step.finished
        for path in paths(one.branch, one.lengths)
        for read in one.read[torch.isin(one.read, path)].tolist()
    }
    ((batch,),) = step.updates
    found = {}
    for number, path in enumerate(paths(batch.branch, batch.lengths)):
        read = batch.student_read[batch.sequence == number]
        assert bool(torch.isin(read, path).all())
        fields = (batch.student_tokens, batch.student_positions, batch.block, batch.clean)
        found[batch.states[number].sample] = (
            *(field[path].tolist() for field in fields),
            torch.searchsorted(path, read).tolist(),
            batch.labels[batch.sequence == number].tolist(),
            sorted(asked),
        )
    return found


def test_sequences_are_those_that_are_packed_alone():
    """Claim: for both ways of reading logits every state's sequence, its reads and labels, and all
    that the teacher is asked, can be read from the trees as from rows without trees."""
    for shift in (False, True):
        shared, apart = (row(replace(p, logit_shift=shift)) for p in (PACKING, APART))
        assert shared == apart and len(shared) == 6


def test_a_beginning_stands_in_a_row_once():
    """Claim: the student reads a prompt's whole blocks once for three responses, the teacher all
    that two responses have in common with the third, and no tree exceeds the budget. Half a
    block is nothing that the student can share."""
    ((shared,),) = pack_step([states()], PACKING).updates
    ((apart,),) = pack_step([states()], APART).updates
    assert len(apart.student_tokens) - len(shared.student_tokens) == 2 * 12
    (asked,), (alone,) = (pack_step([states()], p).finished for p in (PACKING, APART))
    assert len(alone.tokens) - len(asked.tokens) == 2 * 14 + 2
    small = replace(PACKING, tokens_per_microbatch=60)
    (batches,) = pack_step([states()], small).updates
    sizes = {s.sample: student_tokens(s, PACKING) for s in states()}
    assert len(batches) > 1 and all(len(batch.student_tokens) <= 60 for batch in batches)
    assert sum(len(b.student_tokens) for b in batches) < sum(sizes.values())
