"""Update of the student: Megatron's pipeline schedule and distributed optimizer over packed
microbatches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.records import State, UpdateReport
from megatron_opdlm.supervision import activity

# isort: split
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.divergence import (
    STUDENT_FAULT,
    TEACHER_FAULT,
    Divergence,
    Loss,
    distillation_loss,
    likelihood_loss,
)
from megatron_opdlm.errors import RunError
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.vocab_parallel import select_positions
from megatron_opdlm.packing.student import PLACES, PackedBatch
from megatron_opdlm.teacher import Targets, rows_of
from megatron_opdlm.top_k_targets import TopK, keep_top_k, top_k_loss

_PERCENTS = 101  # from 0 to 100


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; raised on every rank, and nothing was updated."""

    def __init__(self, message: str, states: list[State]) -> None:
        super().__init__(message)
        self.states = states  # what this replica's part of the update was made on


@dataclass(frozen=True, kw_only=True)
class Student:
    """The trained model: the module itself, Megatron's wrapper that reduces its gradients, and its
    optimizer.
    """

    model: LanguageModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised."""

    divergence: Divergence  # kind "nll" needs no teacher
    chunk_rows: int
    teacher: LanguageModel | None  # its output projection turns hidden states into distributions
    keep_top_k: bool = False  # the form of the targets: the largest entries of the distributions

    def keep(self, hidden: Tensor) -> Targets:
        """What a phase of the teacher stores of a batch's hidden states [K, H]."""
        if not self.keep_top_k:
            return hidden
        assert self.teacher is not None
        weight = self.teacher.head_weight.detach()
        rows = self.chunk_rows
        return keep_top_k(
            hidden, weight, self.divergence, **_own_columns(self.teacher), chunk_rows=rows
        )


def update(
    student: Student,
    batches: Sequence[PackedBatch],
    targets: Targets | None,
    objective: Objective,
    lr: float,
) -> UpdateReport:
    """Forward, backward and one optimizer step over this replica's microbatches.

    ``targets`` are the teacher's of the whole step, on the last stage; None elsewhere. The
    loss is the mean over all sequences of the update, on all replicas. Raises NonFiniteError,
    before anything is changed, when a sequence's loss or the gradient is not finite.
    """
    report = measure(student, batches, targets, objective)
    for group in student.optimizer.param_groups:
        group["lr"] = lr
    with _already_measured(student.optimizer, report.grad_norm):
        student.optimizer.step()
    return report


@contextmanager
def _already_measured(optimizer: MegatronOptimizer, grad_norm: float) -> Iterator[None]:
    """The optimizer's step takes the gradients that ``measure`` prepared and the norm that it took,
    and does neither again.
    """
    known = {"prepare_grads": lambda: False, "get_grad_norm": lambda: grad_norm}
    vars(optimizer).update(known)
    try:
        yield
    finally:
        for name in known:
            del vars(optimizer)[name]


def measure(
    student: Student,
    batches: Sequence[PackedBatch],
    targets: Targets | None,
    objective: Objective,
) -> UpdateReport:
    """Losses, and gradients left in the buffers, without changing a weight."""
    losses = _accumulate_gradients(student, batches, targets, objective)
    position_values, faults = _over_pipeline(batches, losses)
    values, by_share, by_place = _collect(batches, position_values)
    _require_finite(batches, values, faults)
    found_inf = student.optimizer.prepare_grads()
    grad_norm = float(student.optimizer.get_grad_norm())
    if found_inf or not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"grad_norm={grad_norm} is not finite, though every loss is; nothing was updated: "
            "lower optimizer.lr or look at this step's samples",
            _states(batches),
        )
    return UpdateReport(
        sequence_loss=values.tolist(),
        share_sum={level / 100: total for level, (total, _) in by_share.items()},
        share_count={level / 100: count for level, (_, count) in by_share.items()},
        place_sum={place: total for place, (total, _) in by_place.items()},
        place_count={place: count for place, (_, count) in by_place.items()},
        position_value=position_values.tolist(),
        grad_norm=grad_norm,
    )


def _accumulate_gradients(
    student: Student,
    batches: Sequence[PackedBatch],
    targets: Targets | None,
    objective: Objective,
) -> list[Tensor]:
    """Run Megatron's schedule; returns each microbatch's position values and faults [2, M] (on the
    last stage, else an empty list).
    """
    student.ddp.zero_grad_buffer()
    student.optimizer.zero_grad()
    student.model.config.finalize_model_grads_func = finalize_model_grads
    outputs = get_forward_backward_func()(
        forward_step_func=partial(
            _forward_step, student=student, targets=targets, objective=objective
        ),
        data_iterator=iter(batches),
        model=[student.ddp],
        num_microbatches=len(batches),
        seq_length=1,  # shapes travel with the activations (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=False,
    )
    return [output["positions"] for output in outputs]


def _forward_step(
    iterator: Iterator[PackedBatch],
    model: torch.nn.Module,
    *,
    student: Student,
    targets: Targets | None,
    objective: Objective,
) -> tuple[Tensor, Any]:
    activity.advance()
    batch = next(iterator)
    output = model(
        batch.student_tokens[None],
        batch.student_positions[None],
        None,
        packed_seq_params=batch.student_plan,
    )
    loss = partial(_loss, batch=batch, targets=targets, student=student, objective=objective)
    return output, loss


def _loss(
    output: Tensor,
    *,
    batch: PackedBatch,
    targets: Targets | None,
    student: Student,
    objective: Objective,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum over this rank's positions of the microbatch's sequences, number of sequences, log);
    Megatron divides by the number summed over replicas and their context ranks, of which the first
    counts.
    """
    model = student.model
    hidden = select_positions(
        output, batch.student_read, sequence_parallel=model.config.sequence_parallel
    )
    hidden = hidden.to(model.head_weight.dtype)  # Megatron's 16-bit wrapper returns float32
    common: dict[str, Any] = {
        **_own_columns(model),
        "chunk_rows": objective.chunk_rows,
        "gradient_sum": _gradient_sum(student),
    }
    if objective.divergence.kind == "nll":
        loss = likelihood_loss(hidden, model.head_weight, batch.labels, batch.row_weight, **common)
    else:
        assert targets is not None
        loss = _distance(hidden, targets, batch, model, objective, common)
    counted = len(batch.states) if parallel.context_rank() == 0 else 0
    sequences = torch.tensor(counted, dtype=torch.int, device=output.device)
    return loss.total, sequences, {"positions": torch.stack([loss.value_M, loss.fault_M]).double()}


def _distance(
    hidden: Tensor,
    targets: Targets,
    batch: PackedBatch,
    model: LanguageModel,
    objective: Objective,
    common: dict[str, Any],
) -> Loss:
    """The divergence from the teacher at a microbatch's positions, from either form of targets."""
    rows, row_weight = rows_of(targets, batch.target), batch.row_weight
    divergence = objective.divergence
    if isinstance(rows, TopK):
        return top_k_loss(hidden, model.head_weight, rows, row_weight, divergence, **common)
    assert objective.teacher is not None
    weight = objective.teacher.head_weight.detach()
    return distillation_loss(
        hidden, model.head_weight, rows, weight, row_weight, divergence, **common
    )


def _gradient_sum(student: Student) -> Tensor | None:
    """Megatron's float32 sum of the output weight's gradients, to add to as they are made: the
    schedule scales no loss. None where the weight is frozen, and where sums are exchanged during
    the backward pass, for which Megatron waits until autograd brings every weight a gradient.
    """
    if student.ddp.ddp_config.overlap_grad_reduce:
        return None
    return vars(student.model.head_weight).get("main_grad")


def _own_columns(model: LanguageModel) -> dict[str, Any]:
    """This rank's columns of the vocabulary that are tokens, and the reductions over all shards."""
    shard = model.shard
    columns = max(0, min(shard.columns, shard.vocab_size - shard.start))
    return {"columns": columns, "reduction": shard}


def _over_pipeline(batches: Sequence[PackedBatch], losses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Value (float64, nats) and fault of each counted position of all microbatches, known to every
    pipeline stage.
    """
    positions = sum(len(batch.labels) for batch in batches)
    both = torch.cat(losses, dim=1) if losses else batches[0].row_weight.new_zeros(2, positions)
    value, fault = parallel.broadcast_over_pipeline(both.double())
    return value, fault.long()


_Levels = dict[int, tuple[float, int]]  # level -> sum of its positions' values, their number


def _collect(batches: Sequence[PackedBatch], values: Tensor) -> tuple[Tensor, _Levels, _Levels]:
    """Per-sequence losses [sequences], and the positions' values by masked share, in whole
    percents, and by place in the block; over all context ranks.
    """
    weight = torch.cat([batch.row_weight for batch in batches]).double()
    share = torch.cat([batch.masked_share for batch in batches])
    place = torch.cat([batch.place for batch in batches])
    count = sum(len(batch.states) for batch in batches)
    one = torch.ones_like(values)
    sizes = [count, _PERCENTS, _PERCENTS, PLACES, PLACES]
    index = [_sequence_numbers(batches), *[(share * 100).round().long()] * 2, *[place] * 2]
    parts = [
        values.new_zeros(size).index_add(0, at, value)
        for size, at, value in zip(
            sizes, index, [values * weight, values, one, values, one], strict=True
        )
    ]
    losses, *levels = parallel.sum_over_context(torch.cat(parts)).split(sizes)
    return losses, _levels(*levels[:2]), _levels(*levels[2:])


def _levels(sums: Tensor, counts: Tensor) -> _Levels:
    pairs = enumerate(zip(sums.tolist(), counts.tolist(), strict=True))
    return {level: (total, int(count)) for level, (total, count) in pairs if count}


def _sequence_numbers(batches: Sequence[PackedBatch]) -> Tensor:
    """Of each counted position the number of its sequence among those of all microbatches."""
    numbers, first = [], 0
    for batch in batches:
        numbers.append(batch.sequence + first)
        first += len(batch.states)
    return torch.cat(numbers)


_FAULTS = {
    TEACHER_FAULT: (
        "the teacher's logits for sample {} are not finite; nothing was updated: check the weights "
        "of teacher.path and teacher.dtype"
    ),
    STUDENT_FAULT: (
        "the student's logits for sample {} are not finite; nothing was updated: check the weights "
        "of model.path, model.dtype and optimizer.lr"
    ),
    TEACHER_FAULT | STUDENT_FAULT: (
        "teacher's and student's logits for sample {} are not finite; nothing was updated: check "
        "the weights of teacher.path and model.path"
    ),
    0: (
        "the loss of sample {} is not finite; nothing was updated: check the teacher and student "
        "weights and model.dtype"
    ),
}


def _require_finite(batches: Sequence[PackedBatch], per_sequence: Tensor, fault_M: Tensor) -> None:
    """Raise NonFiniteError, on every rank the same, for the first sample with a non-finite value;
    it names the others, too.
    """
    sequence = _sequence_numbers(batches)
    bad = ~torch.isfinite(per_sequence)
    bad[sequence[fault_M > 0]] = True
    if parallel.all_succeeded(not bad.any()):
        return
    states = _states(batches)
    found = []
    for number in torch.nonzero(bad).flatten().tolist():
        faults = fault_M[sequence == number].unique().tolist()
        found.append((states[number].sample, reduce(or_, faults, 0)))
    everywhere = parallel.gather_objects_over_generators(found)
    first, *more = sorted({sample for sample, _ in everywhere})
    fault = reduce(or_, (fault for sample, fault in everywhere if sample == first))
    others = f"; the same holds for samples {', '.join(map(str, more))}" if more else ""
    raise NonFiniteError(_FAULTS[fault].format(first) + others, states)


def _states(batches: Sequence[PackedBatch]) -> list[State]:
    return [state for batch in batches for state in batch.states]
