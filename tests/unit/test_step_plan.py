"""A run's plan is refused before anything is built where one of its steps could not be done."""

import json
from pathlib import Path

import pytest

from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.run import build
from megatron_opdlm.step_plan import StepPlan
from tests.conftest import MASK, TinyModels

# Longest is the prompt without a cap: 9 + 20 tokens, in blocks of 4 32 positions. The domain's cap
# leaves 14 + 6.
ROWS = [
    {"prompt_ids": [1] * 9, "response": "2"},
    {"prompt_ids": [1] * 14, "domain": "short", "response": "2"},
    {"prompt_ids": [1] * 3, "response": "2"},
]


@pytest.fixture
def plan_of(models: TinyModels, tmp_path: Path):
    def plan(*overrides: str) -> StepPlan:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        keys = [
            f"model.path={models.hf('student', tied=True)}",
            f"model.mask_token_id={MASK}",
            f"data.path={data}",
            "rollout.prompts_per_step=1",
            "rollout.max_new_tokens=20",
            "rollout.max_new_tokens_by_domain={short: 6}",
            "curriculum.start=4",
            "curriculum.end=20",
            "curriculum.kind=linear",
            "curriculum.steps=10",
            "train.steps=10",
            "data.epochs=4",
        ]
        config = load_config(None, [*keys, *overrides])
        return build.build_plan(config, build.open_pair(config)[0])

    return plan


def test_the_cache_holds_the_longest_request_of_any_step(plan_of):
    """Claim: exactly that many positions will do, and the error has both numbers. What the last
    step allows counts, not what the first does, and nothing that the run never generates."""
    assert plan_of("rollout.kv_cache_tokens=32").total_steps == 10
    with pytest.raises(InputError) as caught:
        plan_of("rollout.kv_cache_tokens=31")
    assert str(caught.value) == (
        "rollout.kv_cache_tokens=31 is less than the 32 positions that the longest prompt (9 "
        "tokens) and its response (up to 20) take; raise it, or lower rollout.max_new_tokens or "
        "data.max_prompt_tokens"
    )
    with pytest.raises(InputError, match=r"the 20 positions .* \(14 tokens\) .*up to 4\)"):
        plan_of("rollout.kv_cache_tokens=19", "train.steps=1")
    plan_of("rollout.kv_cache_tokens=20", "train.steps=1")
    plan_of("rollout.kv_cache_tokens=4", "mixing.fraction=1", "loss.kind=nll")


def test_a_plan_without_a_cache_s_size_asks_for_none(plan_of):
    assert plan_of().validate().notes == []


def test_a_ramp_of_thresholds_needs_steps(plan_of):
    """Claim: also where the data decides how many steps there are: three prompts, one a step."""
    keys = ["train.steps=-1", "data.epochs=1", "threshold_schedule.enabled=true"]
    with pytest.raises(InputError, match=r"hold_steps=3 leaves no step of the run's 3 for the"):
        plan_of(*keys, "threshold_schedule.hold_steps=3")
    assert plan_of(*keys, "threshold_schedule.hold_steps=2").total_steps == 3


def test_mask_tokens_in_prompts_are_said(plan_of, tmp_path):
    """Claim: with the first row that has one, counted from 0, and how many there are."""
    masked = tmp_path / "masked.jsonl"
    rows = [{"prompt_ids": [1]}, {"prompt_ids": [1, MASK]}, {"prompt_ids": [MASK]}]
    masked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [note] = plan_of(f"data.path={masked}", "train.steps=1").notes
    assert note.startswith(f"note: 2 of 3 prompts hold the mask token {MASK}, first row 1 (from 0)")


def test_a_capped_curriculum_is_said(plan_of):
    capped = plan_of("curriculum.end=24")
    assert capped.budget(10) == 20
    assert capped.notes == ["note: rollout.max_new_tokens=20 caps curriculum.end=24"]
    assert plan_of("curriculum.end=24", "curriculum.kind=constant").notes == []


def test_a_run_ends_with_its_data_and_says_so(plan_of):
    """Claim: more steps than the epochs hold are no second helping: the run, its schedules with
    it, ends with the data, and a note says both numbers; as many as there are need none."""
    short = plan_of("train.steps=10", "data.epochs=2")
    assert short.total_steps == short.planned_steps == 6
    [note] = short.notes
    assert "train.steps=10" in note and "3 prompts are used up after 6 steps" in note
    for keys in (["train.steps=6", "data.epochs=2"], ["train.steps=-1"]):
        assert plan_of(*keys).notes == []
    ends = (["train.steps=5", "data.epochs=2", f"train.stop_after={last}"] for last in (4, 9))
    early, late = (plan_of(*keys) for keys in ends)
    assert (early.total_steps, early.planned_steps, early.notes) == (4, 5, [])
    assert (early.steps_told, short.steps_told) == ("4 (planned: 5)", "6")
    assert (late.total_steps, late.planned_steps) == (6, 5)
    assert "train.stop_after=9, but 3 prompts are used up after 6 steps" in late.notes[0]
