"""The live objects of one training run, and the glue between the stages of a step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from megatron_opdlm import parallel
from megatron_opdlm.checkpoint import Checkpoints, Progress
from megatron_opdlm.config import Config
from megatron_opdlm.engine.decoder import DecoderKeeper
from megatron_opdlm.errors import Stopped
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.metrics import MetricsWriter
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.offload import layers_here, optimizer_away
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import StepBatches, pack_step
from megatron_opdlm.packing.student import PackedBatch, beginnings, student_tokens
from megatron_opdlm.planning import balance
from megatron_opdlm.records import Rollout, State, Trajectory, UpdateReport
from megatron_opdlm.reporting import accounting
from megatron_opdlm.reporting.profiling import Profiler
from megatron_opdlm.reporting.sample_texts import sample_rows
from megatron_opdlm.reporting.token_views import view_tokens
from megatron_opdlm.rollout import generate_over_copies
from megatron_opdlm.run.build import ModelSource, kernels_of, low_rank_of
from megatron_opdlm.run.exports import Exports
from megatron_opdlm.step_plan import StepPlan
from megatron_opdlm.supervision import activity, preemption, watchdog
from megatron_opdlm.teacher import Targets, score
from megatron_opdlm.update import Objective, Student


@dataclass(kw_only=True)
class Session:
    """Everything a run holds. ``progress`` is the only part that changes; the rest changes inside
    (weights, optimizer).
    """

    config: Config
    hardware: Hardware
    source: ModelSource
    plan: StepPlan
    student: Student
    teacher: (
        LanguageModel | None
    )  # None: the loss needs none; may be the student, whose base is asked
    teacher_source: ModelSource
    objective: Objective
    checkpoints: Checkpoints
    exports: Exports
    metrics: MetricsWriter
    progress: Progress
    profiler: Profiler
    saved_step: int  # of the newest checkpoint; 0: there is none
    decoders: DecoderKeeper = field(default_factory=DecoderKeeper)

    def watch(self, step: int) -> accounting.Stopwatch:
        """The clock of a step; the begin of each phase is a point where the run can stop."""
        self.profiler.begin(step)
        return accounting.Stopwatch(
            before=partial(self._begin, step),
            around=self.profiler.phase,
            memory=self.hardware.peak_memory,
        )

    def _begin(self, step: int, phase: str) -> None:
        watchdog.enter(phase, step)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Raise Stopped, on all ranks together, if any of them was asked to stop."""
        if not parallel.all_succeeded(not preemption.requested()):
            raise Stopped(preemption.reason())

    @property
    def state_options(self) -> dict[str, Any]:
        """How trajectories become states."""
        return {
            "mode": self.config.states.mode,
            "block_size": self.config.rollout.block_size,
            "vocabulary": self.source.vocabulary,
            "exclude_eos": self.config.loss.exclude_eos,
            "alignment": self.config.states.block_alignment,
            "draws": self.config.states.per_response,
        }

    def rollout(self, step: int, key: tuple[int, int]) -> Rollout:
        """Generate this step's responses, shared out over all copies of the model; all of them end
        up on every rank.
        """
        made = generate_over_copies(
            self.student.model,
            self.plan.requests(step),
            self.plan.decoding(step),
            self.source.vocabulary,
            key=key,
            options=self.config.rollout,
            stop=preemption.requested,
            keeper=self.decoders,
        )
        if not made.complete:
            raise Stopped(preemption.reason())
        return made

    def sequences(self, step: int, rollout: Rollout) -> list[Trajectory]:
        """All trajectories of a step by their number: generated and recorded ones."""
        both = [*rollout.trajectories, *self.plan.recorded_trajectories(step)]
        return sorted(both, key=lambda t: t.sample)

    def pack(self, states: Sequence[State]) -> StepBatches:
        """This replica's part of the updates of one inner epoch, and what its teacher is asked."""
        size = self.config.optimizer.batch_size
        packing = packing_of(self.config, self.source, self.hardware)
        return pack_step(
            [
                my_share(states[start : start + size], self.source, self.teacher_source, packing)
                for start in range(0, len(states), size)
            ],
            packing,
        )

    def ask_teacher(self, batches: StepBatches) -> Targets | None:
        """The step's targets; None where the loss needs no teacher."""
        if self.teacher is None:
            return None
        options = self.config.teacher
        with layers_here(self.teacher, self.hardware.device, on=self.teacher_waits):
            return score(
                self.teacher,
                batches.finished,
                offload=options.offload_targets,
                keep=self.objective.keep,
            )

    @property
    def teacher_waits(self) -> bool:
        """Whether the teacher's layers are in host memory while it is not asked: not where it is
        the student.
        """
        own = self.teacher is not self.student.model
        return own and self.config.teacher.offload_weights

    def optimizer_away(self) -> AbstractContextManager[None]:
        """For the phases before the update, which do not need the optimizer."""
        return optimizer_away(self.student.optimizer, on=self.config.optimizer.cpu_offload)

    def update_schedule(
        self, step: int, batches: StepBatches
    ) -> list[tuple[list[PackedBatch], float]]:
        """(microbatches, learning rate) of each optimizer step: all prepared updates once per inner
        epoch.
        """
        order = batches.updates * self.config.train.inner_epochs
        return [
            (packed, self.plan.learning_rate(step, number, len(order)))
            for number, packed in enumerate(order)
        ]

    def finish_step(
        self,
        step: int,
        rollout: Rollout,
        states: Sequence[State],
        batches: StepBatches,
        targets: Targets | None,
        reports: Sequence[UpdateReport],
        watch: accounting.Stopwatch,
    ) -> None:
        """Count and write."""
        watchdog.enter("metrics", step)
        flops = self._flops(batches) + rollout.flops
        counts = accounting.rollout_counts(rollout.trajectories) | accounting.state_counts(
            states,
            mask_id=self.source.vocabulary.mask_id,
            uses=self.config.train.inner_epochs,
        )
        trained = int(counts["trained_tokens"])
        done = self.progress
        self.progress = replace(
            done,
            step=step,
            cumulative_trained_tokens=done.cumulative_trained_tokens + trained,
            cumulative_rollout_tokens=done.cumulative_rollout_tokens
            + int(counts["rollout_tokens"]),
            cumulative_flops=done.cumulative_flops + flops,
            cumulative_flops_paper=done.cumulative_flops_paper
            + accounting.paper_flops(self.source.shape, trained),
        )
        losses = accounting.reduce_losses(reports, self.config.rollout.block_size)
        speeds = accounting.speeds(watch, trained, int(counts["rollout_tokens"]))
        ranks = accounting.over_ranks(watch)
        row = losses | counts | speeds | ranks | asdict(self.progress)
        row |= {
            "lr": self.plan.learning_rate(step, len(reports) - 1, len(reports)),
            "max_new_tokens": self.plan.budget(step),
            "threshold": self.plan.decoding(step).threshold,
            "updates": len(reports),
            "peak_memory_bytes": int(parallel.max_over_ranks(self.hardware.peak_memory.highest())),
        }
        self.metrics.write(step, row)
        if note := accounting.nothing_to_learn(counts):
            self.metrics.say_once(note)
        watchdog.enter("profile", step)
        self.profiler.end(step)
        every = self.config.logging.samples_every
        if every and (step % every == 0 or step == 1):
            chosen = rollout.trajectories[: self.config.logging.samples]
            shown = {trajectory.sample for trajectory in chosen}
            views = view_tokens(shown, batches.updates, reports, targets, self.objective)
            self.metrics.samples(step, sample_rows(chosen, self.source.files, views))

    def save_if_due(self) -> None:
        """At the end of a step: publish the save under way if it is written, begin one if it is
        time; the same of exports.
        """
        step = self.progress.step
        self.checkpoints.poll()
        if step % self.config.checkpoint.every == 0 or step == self.plan.total_steps:
            self.save()
        if parallel.is_writer():
            self.exports.advance()

    def save(self) -> None:
        """A checkpoint of the last finished step, unless it has one."""
        step = self.progress.step
        if step > self.saved_step:
            watchdog.enter("save", step)
            self.checkpoints.save(self.student, self.progress)
            self.saved_step = step

    def _flops(self, batches: StepBatches) -> float:
        """Operations of the teacher's and the update's phase, over all replicas and their context
        ranks.
        """
        config = self.config
        student, teacher = kernels_of(config, self.hardware)
        flops = accounting.step_flops(
            self.source.shape,
            self.teacher_source.shape if self.teacher else None,
            batches,
            uses=config.train.inner_epochs,
            recompute=config.model.recompute,
            sequence_parallel=config.model.sequence_parallel,
            low_rank=low_rank_of(config),
            attention=(student.attention, teacher.attention),
            top_k_targets=config.teacher.targets == "top_k",
        )
        total = torch.tensor(flops, dtype=torch.float64, device=self.hardware.device)
        return float(parallel.sum_over_generators(total))

    def close(self, *, exports: bool = True) -> None:
        """End of the run. ``exports``: wait for those under way. Its sign comes through torchrun's
        store, which is gone where the launcher was killed.
        """
        self.profiler.close()
        self.checkpoints.finish()
        if exports and self.config.checkpoint.export:
            watchdog.enter("export", self.progress.step)
            parallel.wait_for_writer(
                lambda: self.exports.finish(activity.advance, preemption.requested),
                activity.advance,
            )
        self.metrics.close()
        parallel.barrier()


def packing_of(config: Config, source: ModelSource, hardware: Hardware) -> Packing:
    """How the configuration packs rows."""
    student, teacher = kernels_of(config, hardware)
    return Packing(
        block_size=config.rollout.block_size,
        mask_id=source.vocabulary.mask_id,
        logit_shift=config.loss.logit_shift,
        tokens_per_microbatch=config.update.tokens_per_microbatch or hardware.row_tokens,
        align=config.model.tensor_parallel,
        device=hardware.device,
        context_ranks=parallel.context_size(),
        context_rank=parallel.context_rank(),
        alignment=config.states.block_alignment,
        share_student=student.skips_hidden,
        share_teacher=teacher.skips_hidden,
        rows_in_step=parallel.most_over_experts,
    )


def my_share(
    states: Sequence[State], student: ModelSource, teacher: ModelSource, packing: Packing
) -> list[State]:
    """This replica's states of one update: every replica gets about the same operations."""
    replicas = parallel.data_parallel_size()
    if replicas == 1:
        return list(states)
    shapes = student.shape, teacher.shape
    costs = [accounting.state_cost(*shapes, s, student_tokens(s, packing)) for s in states]
    saved = [accounting.shared_cost(*shapes, s, packing) for s in states]
    alike = beginnings(states)
    shares = balance.share_out_alike(costs, alike, saved, replicas)
    return [states[i] for i in shares[parallel.data_parallel_rank()]]
