"""States -> the packed rows of a step: microbatches of the student, finished sequences for the
teacher.

Only what the loss depends on is packed, and nothing is padded. What several responses to a prompt
begin with stands in a row once.

With context parallelism every context rank packs the same rows and keeps its share of their tokens.
Ranks that share out experts need each other in every forward, so they all get as many rows as the
one that has most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_opdlm.packing.finished import FinishedBatch, Questions
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.student import PackedBatch, pack_update
from megatron_opdlm.records import State


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What one replica works on in a step, or its context rank's share. The wanted targets of
    ``finished``, one after the other, are what ``PackedBatch.target`` counts in."""

    updates: list[list[PackedBatch]]  # microbatches of each update of an inner epoch
    finished: list[FinishedBatch]


def pack_step(updates: Sequence[Sequence[State]], packing: Packing) -> StepBatches:
    """Pack one replica's states of each update of a step.

    An update without states, and a step without a counted position, are rows of ``align`` tokens
    without loss: every rank takes part in the collectives.
    """
    questions = Questions([state for states in updates for state in states])
    finished = questions.pack(packing)
    packed = [pack_update(states, questions, packing) for states in updates]
    return _keep_wanted(packed, finished)


def _keep_wanted(updates: list[list[PackedBatch]], finished: list[FinishedBatch]) -> StepBatches:
    """Leave this rank the targets that its share of the rows asks for, and number them anew."""
    used = torch.cat([batch.target for batches in updates for batch in batches]).unique()
    kept, first = [], 0
    for batch in finished:
        inside = (used >= first) & (used < first + len(batch.wanted))
        kept.append(replace(batch, wanted=batch.wanted[used[inside] - first]))
        first += len(batch.wanted)
    renumbered = [
        [replace(batch, target=torch.searchsorted(used, batch.target)) for batch in batches]
        for batches in updates
    ]
    return StepBatches(updates=renumbered, finished=kept)
