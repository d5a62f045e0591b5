"""Schedules give the published numbers (spec of the reference's schedules, computed there)."""

import pytest

from megatron_opdlm.config import (
    CurriculumConfig,
    OptimizerConfig,
    RolloutConfig,
    ThresholdScheduleConfig,
)
from megatron_opdlm.curriculum import (
    curve,
    generation_budget,
    learning_rate,
    response_limit,
    threshold_at,
    updates_per_step,
)
from megatron_opdlm.errors import InputError

STEPS = [1, 5, 10, 20, 30, 40, 50, 60, 75, 80, 90, 100, 150, 200]
PUBLISHED = {  # (end, ramp): budgets at STEPS; cos, start 100, block 4
    (4000, 100): [100, 112, 148, 292, 524, 844, 1244, 1708, 2508, 2796, 3388, 4000, 4000, 4000],
    (2000, 100): [100, 104, 124, 192, 308, 464, 656, 884, 1272, 1412, 1704, 2000, 2000, 2000],
    (8000, 200): [100, 108, 124, 196, 320, 488, 700, 960, 1432, 1608, 1992, 2412, 4976, 8000],
}


@pytest.mark.parametrize(("end", "ramp"), PUBLISHED)
def test_generation_budget_is_the_published_table(end, ramp):
    curriculum = CurriculumConfig(kind="cos", start=100, end=end, steps=ramp)
    rollout = RolloutConfig(max_new_tokens=8000)
    budgets = [generation_budget(step, curriculum, rollout) for step in STEPS]
    assert budgets == PUBLISHED[(end, ramp)]


def test_linear_and_sin_budgets_by_hand():
    rollout = RolloutConfig(block_size=4)
    linear = CurriculumConfig(kind="linear", start=0, end=80, steps=10)
    assert [generation_budget(s, linear, rollout) for s in (1, 5, 10, 11)] == [8, 40, 80, 80]
    # sin(pi/6) = 1/2 at a third of the ramp
    sin = CurriculumConfig(kind="sin", start=20, end=60, steps=3)
    assert generation_budget(1, sin, rollout) == 40


def test_budget_rounds_half_to_even_and_is_at_least_a_block():
    rollout = RolloutConfig(block_size=4)

    def flat(tokens: int) -> CurriculumConfig:
        return CurriculumConfig(kind="linear", start=tokens, end=tokens, steps=1)

    budgets = {n: generation_budget(1, flat(n), rollout) for n in (1, 2, 6, 10, 13, 14)}
    assert budgets == {1: 4, 2: 4, 6: 8, 10: 8, 13: 12, 14: 16}


def test_constant_budget_ignores_the_ramp():
    curriculum = CurriculumConfig(kind="constant", start=8, end=16, steps=10)
    rollout = RolloutConfig(max_new_tokens=50)
    assert {generation_budget(s, curriculum, rollout) for s in (1, 5, 100)} == {50}


def test_curriculum_never_exceeds_max_new_tokens():
    curriculum = CurriculumConfig(start=100, end=4000, steps=100)
    rollout = RolloutConfig(max_new_tokens=250)
    assert [generation_budget(s, curriculum, rollout) for s in (1, 10, 20)] == [100, 148, 250]


def test_response_limit_is_capped_by_the_rows_domain():
    limits = {"code": 2048, "science": 1024}
    assert response_limit(4000, "code", limits) == 2048
    assert response_limit(500, "code", limits) == 500
    assert response_limit(4000, "math", limits) == 4000
    assert response_limit(4000, None, limits) == 4000


def test_curves_run_from_zero_to_one_and_cos_is_the_slow_start():
    for kind in ("linear", "sin", "cos"):
        assert curve(kind, 0.0) == 0.0
        assert curve(kind, 1.0) == pytest.approx(1.0, abs=1e-15)
    assert curve("cos", 0.5) < 0.5 < curve("sin", 0.5)
    assert curve("sin", 0.3) + curve("cos", 0.7) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.9), (150, 0.9), (200, 0.8945), (300, 0.852), (400, 0.7763), (483, 0.7), (500, 0.7)],
)
def test_threshold_is_the_published_schedule(step, expected):
    schedule = ThresholdScheduleConfig(enabled=True)
    value = threshold_at(step, schedule, RolloutConfig(threshold=0.3), 483)
    assert value == pytest.approx(expected, abs=5e-5)


def test_threshold_over_a_given_ramp_and_without_a_schedule():
    schedule = ThresholdScheduleConfig(enabled=True, kind="linear", hold_steps=10, steps=4)
    values = [threshold_at(s, schedule, RolloutConfig(), 1000) for s in (10, 11, 12, 14, 15)]
    assert values == pytest.approx([0.9, 0.85, 0.8, 0.7, 0.7])
    off = ThresholdScheduleConfig(enabled=False)
    assert threshold_at(400, off, RolloutConfig(threshold=0.95), 483) == 0.95


def test_threshold_ramp_needs_steps():
    schedule = ThresholdScheduleConfig(enabled=True, hold_steps=150)
    with pytest.raises(InputError, match=r"hold_steps=150 leaves no step of the run's 150"):
        threshold_at(1, schedule, RolloutConfig(), 150)


@pytest.mark.parametrize(
    ("update", "expected", "tolerance"),
    [
        (0, 0.0, 0.0),
        (1, 1.25e-7, 1e-18),
        (79, 9.875e-6, 1e-17),
        (80, 1e-5, 0.0),
        (3904, 5.501e-6, 5e-10),
        (7728, 1e-6, 1e-12),
    ],
)
def test_learning_rate_is_the_published_schedule(update, expected, tolerance):
    rate = learning_rate(update, OptimizerConfig(), updates_per_step=16, total_steps=483)
    assert rate == pytest.approx(expected, rel=0, abs=tolerance)


def test_learning_rate_warms_up_for_steps_not_updates():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.0, warmup_steps=2)
    rates = [learning_rate(k, optimizer, updates_per_step=3, total_steps=100) for k in range(7)]
    assert rates == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])


def test_learning_rate_without_warm_up_starts_at_its_peak_and_stays_at_its_floor():
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0)
    assert learning_rate(0, optimizer, updates_per_step=2, total_steps=5) == 1e-3
    for update in (11, 12, 1000):
        rate = learning_rate(update, optimizer, updates_per_step=2, total_steps=5)
        assert rate == pytest.approx(1e-4)


def test_updates_per_step_counts_the_last_partial_batch():
    assert updates_per_step(128, 8, 1) == 16
    assert updates_per_step(129, 8, 1) == 17
    assert updates_per_step(5, 8, 3) == 3
