"""Schedules, as pure functions of the step (counted from 1) or of the update (counted from 0)."""

import math
from collections.abc import Mapping

from megatron_opdlm.config import (
    CurriculumConfig,
    MixingConfig,
    OptimizerConfig,
    RolloutConfig,
    ThresholdScheduleConfig,
)
from megatron_opdlm.errors import InputError


def curve(kind: str, progress: float) -> float:
    """f(p) in [0, 1] for progress p in [0, 1]; ``cos`` starts slowly, ``sin`` ends slowly."""
    if kind == "linear":
        return progress
    if kind == "sin":
        return math.sin(math.pi * progress / 2)
    if kind == "cos":
        return 1 - math.cos(math.pi * progress / 2)
    raise AssertionError(f"curve {kind!r}")


def generation_budget(step: int, curriculum: CurriculumConfig, rollout: RolloutConfig) -> int:
    """Response tokens that step ``step`` may generate.

    B * round((start + (end - start) f(min(step / steps, 1))) / B), half to even, at least one
    block B and at most ``rollout.max_new_tokens``.
    """
    if curriculum.kind == "constant":
        return rollout.max_new_tokens
    fraction = curve(curriculum.kind, min(step / curriculum.steps, 1.0))
    tokens = curriculum.start + (curriculum.end - curriculum.start) * fraction
    block = rollout.block_size
    return min(max(block, block * round(tokens / block)), rollout.max_new_tokens)


def response_limit(budget: int, domain: str | None, limits: Mapping[str, int]) -> int:
    """The step's budget, capped by the row's domain where ``limits`` names it."""
    return budget if domain is None else min(budget, limits.get(domain, budget))


def threshold_at(
    step: int, schedule: ThresholdScheduleConfig, rollout: RolloutConfig, total_steps: int
) -> float:
    """Confidence above which dynamic remasking commits a token at this step.

    ``start`` through ``hold_steps``, then the curve to ``end`` over ``steps`` more (-1: all that
    remain of ``total_steps``); ``rollout.threshold`` when the schedule is off.
    """
    if not schedule.enabled:
        return rollout.threshold
    ramp = schedule.steps if schedule.steps > 0 else total_steps - schedule.hold_steps
    if ramp < 1:
        raise InputError(
            f"threshold_schedule.hold_steps={schedule.hold_steps} leaves no step of the run's "
            f"{total_steps} for the ramp; use less than {total_steps}, or set "
            "threshold_schedule.steps"
        )
    if step <= schedule.hold_steps:
        return schedule.start
    fraction = curve(schedule.kind, min((step - schedule.hold_steps) / ramp, 1.0))
    return schedule.start + (schedule.end - schedule.start) * fraction


def off_policy_fraction(step: int, mixing: MixingConfig) -> float:
    """Share of this step's sequences that are recorded responses: from ``fraction`` along the curve
    to ``end_fraction`` at step ``steps``, and so on.
    """
    if mixing.kind == "constant":
        return mixing.fraction
    done = curve(mixing.kind, min(step / mixing.steps, 1.0))
    return mixing.fraction + (mixing.end_fraction - mixing.fraction) * done


def updates_per_step(sequences: int, batch_size: int, inner_epochs: int) -> int:
    """Optimizer updates made from one rollout of ``sequences`` sequences."""
    return math.ceil(sequences / batch_size) * inner_epochs


def learning_rate(
    update: float, optimizer: OptimizerConfig, *, updates_per_step: int, total_steps: int
) -> float:
    """Learning rate of update k = ``update``, counted from 0 over the whole run.

    A step that makes more or fewer updates than ``updates_per_step`` spreads its share of k evenly
    over them, so k may be a fraction.

    Linear warm-up over W = ``warmup_steps`` * ``updates_per_step`` updates, so the very first
    update has rate 0; then half a cosine from ``lr`` to ``min_lr`` at
    T = ``updates_per_step`` * ``total_steps`` + 1.
    """
    warmup = optimizer.warmup_steps * updates_per_step
    total = updates_per_step * total_steps + 1
    if update < warmup:
        return optimizer.lr * update / warmup
    progress = min((update - warmup) / max(1, total - warmup), 1.0)
    half_cosine = (1 + math.cos(math.pi * progress)) / 2
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * half_cosine
