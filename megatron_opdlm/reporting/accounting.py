"""Tokens, floating-point operations and seconds of a step (definitions: ``docs/metrics.md``)."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.configuration.models import LoraTarget, Recompute
from megatron_opdlm.diffusion.blocks import first_block_start
from megatron_opdlm.hardware.peak_memory import PeakMemory
from megatron_opdlm.model.flops import (
    attention_flops,
    forward_flops,
    low_rank_parameters,
    mlp_flops,
    packed_row_pairs,
)
from megatron_opdlm.model_files.manifest import LowRank
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.packing.finished import FinishedBatch
from megatron_opdlm.packing.prefix_trees import is_worth_sharing
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import StepBatches
from megatron_opdlm.packing.student import PackedBatch, place_width, student_tokens
from megatron_opdlm.records import State, Trajectory, UpdateReport

# A phase of the metrics -> those of the loop.
PHASES = {"rollout": ("rollout",), "teacher": ("teacher",), "update": ("states", "update")}


def student_flops(
    shape: ModelShape,
    batch: PackedBatch,
    *,
    recompute: Recompute,
    sequence_parallel: bool,
    low_rank: LowRank | None = None,
    attention: str = "dense",
) -> float:
    """Operations of one use of a microbatch: forward, backward (twice as much) and once more the
    forward of what is recomputed. With low-rank terms the backward of all frozen
    matrices is half: they need no gradient of their own. ``attention`` names the student's kernel.
    """
    rows = len(batch.labels)
    row = batch.lengths, batch.block, batch.clean, batch.branch
    pairs = packed_row_pairs(attention, *row) / batch.split.ranks
    tokens = len(batch.student_tokens)
    layers = _layers_flops(shape, batch.student_tokens, pairs, rows, sequence_parallel)
    head, products = projection_flops(shape, rows), attention_flops(shape, pairs)
    again = {
        "false": 0.0,
        "true": layers,
        "attention": products,
        "mlp": mlp_flops(shape, tokens=tokens, read_rows=None if sequence_parallel else rows),
    }[recompute]
    if low_rank is None:
        return 3 * layers + again + 3 * head
    repeated = [target for target in low_rank.targets if target in _RECOMPUTED[recompute]]
    terms, terms_again = (
        low_rank_flops(shape, replace(low_rank, targets=tuple(targets)), tokens)
        for targets in (low_rank.targets, repeated)
    )
    return 2 * layers + again + products + 3 * terms + terms_again + 2 * head


_RECOMPUTED: Mapping[Recompute, tuple[str, ...]] = {
    "false": (),
    "true": get_args(LoraTarget),
    "attention": (),
    "mlp": ("linear_fc1", "linear_fc2"),
}


def low_rank_flops(shape: ModelShape, low_rank: LowRank, tokens: int) -> float:
    """Operations of a forward of all low-rank terms, every token in every layer."""
    return 2.0 * low_rank_parameters(shape, low_rank) * tokens


def teacher_flops(
    shape: ModelShape, batch: FinishedBatch, *, sequence_parallel: bool, attention: str = "dense"
) -> float:
    """Operations of the teacher's forward without its output layer."""
    rows = len(batch.read)
    clean = None if batch.block is None else torch.ones_like(batch.block, dtype=torch.bool)
    row = batch.lengths, batch.block, clean, batch.branch
    pairs = packed_row_pairs(attention, *row) / batch.split.ranks
    return _layers_flops(shape, batch.tokens, pairs, rows, sequence_parallel)


def projection_flops(shape: ModelShape, rows: int) -> float:
    """Operations of projecting rows of hidden states to the vocabulary."""
    return 2.0 * shape.vocab_size * shape.hidden * rows


def state_cost(student: ModelShape, teacher: ModelShape, state: State, packed_tokens: int) -> float:
    """Operations of training on a state, for sharing work out: attention makes long sequences cost
    more than their tokens. ``packed_tokens``: what the student reads.
    """
    rows, finished = sum(state.counted), len(state.prompt_ids) + len(state.response_ids)
    asked, read = (
        forward_flops(shape, tokens=n, attended_pairs=n * n, projected_rows=rows, read_rows=rows)
        for shape, n in ((teacher, finished), (student, packed_tokens))
    )
    return asked + 3 * read


def shared_cost(student: ModelShape, teacher: ModelShape, state: State, packing: Packing) -> float:
    """Operations that a state costs less in a row with another one of its prompt."""
    shift = packing.shift(state)
    tokens = first_block_start(len(state.prompt_ids) + shift, packing.block_size) - shift
    if not is_worth_sharing(tokens, student_tokens(state, packing) - tokens):
        return 0.0
    once = [
        forward_flops(shape, tokens=tokens, attended_pairs=tokens**2, projected_rows=0)
        for shape in (teacher, student)
    ]
    return packing.share_teacher * once[0] + 3 * packing.share_student * once[1]


def step_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    batches: StepBatches,
    *,
    uses: int,
    recompute: Recompute,
    sequence_parallel: bool,
    low_rank: LowRank | None,
    attention: tuple[str, str],
    top_k_targets: bool,
) -> float:
    """Operations of a step's teacher phase and of its updates, each made ``uses`` times, on this
    rank's replica. ``teacher`` None: the loss asks none. ``attention``: kernels of both. Hidden
    states are projected at each use of them, ``top_k_targets`` once, when they are made.
    """
    flops = 0.0
    for batch in (batch for microbatches in batches.updates for batch in microbatches):
        flops += uses * student_flops(
            student,
            batch,
            recompute=recompute,
            sequence_parallel=sequence_parallel,
            low_rank=low_rank,
            attention=attention[0],
        )
        if teacher and not top_k_targets:
            flops += uses * projection_flops(teacher, len(batch.labels))
    if teacher:
        flops += sum(
            teacher_flops(
                teacher, batch, sequence_parallel=sequence_parallel, attention=attention[1]
            )
            for batch in batches.finished
        )
        if top_k_targets:
            wanted = sum(len(batch.wanted) for batch in batches.finished)
            flops += projection_flops(teacher, wanted)
    return flops


def _layers_flops(
    shape: ModelShape, tokens: Tensor, pairs: float, rows: int, sequence_parallel: bool
) -> float:
    """Operations of a forward without the output layer."""
    return forward_flops(
        shape,
        tokens=len(tokens),
        attended_pairs=pairs,
        projected_rows=0,
        read_rows=None if sequence_parallel else rows,
    )


def paper_flops(shape: ModelShape, trained_tokens: int) -> float:
    """The paper's figure 8 N D: 2 N teacher + 6 N student per trained token, generation and prompts
    left out. N of a mixture of experts are the parameters that work on a token.
    """
    return 8.0 * shape.active_parameters * trained_tokens


@dataclass
class Stopwatch:
    """Wall-clock seconds and peak of memory by phase of one step, on this rank. ``before`` is
    called with the name of each phase before it begins; ``around`` gives what the phase runs in.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    memory: PeakMemory | None = None
    before: Callable[[str], None] = lambda name: None
    around: Callable[[str], AbstractContextManager[object]] = nullcontext

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        self.before(name)
        if self.memory is not None:
            self.memory.restart()
        start = time.perf_counter()
        try:
            with self.around(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if self.memory is not None:
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), self.memory.recent())


def rollout_counts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What the rollout made: whole numbers of tokens and their ratios to passes and forwards."""
    tokens = sum(t.response_tokens for t in trajectories)
    passes = sum(t.passes for t in trajectories)
    forwards = sum(t.forwards for t in trajectories)
    return {
        "rollout_tokens": tokens,
        "tokens_per_denoising_step": tokens / max(passes, 1),
        "tokens_per_forward": tokens / max(forwards, 1),
        "mean_response_tokens": tokens / max(len(trajectories), 1),
        "eos_fraction": sum(t.finish_reason == "stop" for t in trajectories)
        / max(len(trajectories), 1),
    }


def state_counts(states: Sequence[State], *, mask_id: int, uses: int = 1) -> dict[str, int]:
    """What the updates are made on; tokens count once per use of a state (inner epochs)."""
    return {
        "sequences": len(states),
        "sequences_without_loss": sum(not any(state.counted) for state in states),
        "sequences_with_mask_token": sum(
            mask_id in state.prompt_ids or mask_id in state.response_ids for state in states
        ),
        "off_policy_sequences": sum(state.off_policy for state in states),
        "trained_tokens": uses * sum(state.trained_tokens for state in states),
        "loss_tokens": uses * sum(sum(state.counted) for state in states),
    }


def nothing_to_learn(counts: Mapping[str, float]) -> str:
    """What to say of a step without a counted position; empty where there is one."""
    if counts["loss_tokens"]:
        return ""
    return (
        "a step had no sequence with a position under loss, so nothing was learned from it: its "
        "responses end at once, and with loss.exclude_eos an end token alone teaches nothing; look "
        "at samples.jsonl and at loss_tokens in metrics.jsonl"
    )


def speeds(watch: Stopwatch, trained_tokens: int, rollout_tokens: int) -> dict[str, float]:
    """Seconds of the phases and tokens a second; ``trained_tokens_per_second`` counts the whole
    step's time.
    """
    seconds = _phase_seconds(watch)
    total = sum(watch.seconds.values())
    return {f"seconds_{phase}": seconds[phase] for phase in PHASES} | {
        "trained_tokens_per_second": trained_tokens / max(total, 1e-9),
        "rollout_tokens_per_second": rollout_tokens / max(seconds["rollout"], 1e-9),
    }


def _phase_seconds(watch: Stopwatch) -> dict[str, float]:
    return {
        phase: sum(watch.seconds.get(part, 0.0) for part in parts)
        for phase, parts in PHASES.items()
    }


def over_ranks(watch: Stopwatch) -> dict[str, dict[str, float]]:
    """Of each phase the slowest rank, its seconds, and the largest memory of any rank."""
    mine = [*_phase_seconds(watch).values()]
    mine += [max(watch.peak_bytes.get(part, 0) for part in parts) for parts in PHASES.values()]
    table = parallel.gather_numbers(mine)
    columns = list(zip(*table, strict=True))
    seconds = dict(zip(PHASES, columns[: len(PHASES)], strict=True))
    memory = dict(zip(PHASES, columns[len(PHASES) :], strict=True))
    return {
        "slowest_seconds": {phase: max(each) for phase, each in seconds.items()},
        "slowest_rank": {phase: each.index(max(each)) for phase, each in seconds.items()},
        "peak_memory_bytes_by_phase": {phase: int(max(each)) for phase, each in memory.items()},
    }


def reduce_losses(reports: Sequence[UpdateReport], block_size: int) -> dict[str, Any]:
    """Means over the step's updates, summed over the model replicas first.

    ``loss`` is each update's mean over its sequences, ``kl`` the mean over positions in nats,
    ``kl_by_masked_fraction`` the same by the share of its block's response tokens that were masked,
    ``kl_by_block_position`` by the position in the block, from 1.
    """
    light = [replace(report, position_value=[]) for report in reports]
    replicas = parallel.gather_objects_over_data_parallel([light])
    losses = []
    for shares in zip(*replicas, strict=True):
        values = [value for report in shares for value in report.sequence_loss]
        losses.append(sum(values) / len(values))
    everything = [report for replica in replicas for report in replica]
    sums, counts = _added((report.share_sum, report.share_count) for report in everything)
    place_sums, place_counts = _added((r.place_sum, r.place_count) for r in everything)
    width = place_width(block_size)
    return {
        "loss": sum(losses) / len(losses),
        "kl": sum(sums.values()) / max(sum(counts.values()), 1),
        "grad_norm": sum(report.grad_norm for report in reports) / len(reports),
        "kl_by_masked_fraction": {
            f"{share:.2f}": sums[share] / counts[share] for share in sorted(sums)
        },
        "kl_by_block_position": {
            f"{1 + width * at}": place_sums[at] / place_counts[at] for at in sorted(place_sums)
        },
    }


def _added(
    pairs: Iterable[tuple[Mapping[Any, float], Mapping[Any, int]]],
) -> tuple[dict[Any, float], dict[Any, int]]:
    """Sums and counts by level, added up."""
    sums: dict[Any, float] = {}
    counts: dict[Any, int] = {}
    for own_sums, own_counts in pairs:
        for level, value in own_sums.items():
            sums[level] = sums.get(level, 0.0) + value
            counts[level] = counts.get(level, 0) + own_counts[level]
    return sums, counts
