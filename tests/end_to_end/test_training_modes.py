"""Every way of training that the configuration offers goes through the whole loop, and its numbers
fit together.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import training_run
from tests.conftest import TinyModels
from tests.distributed import jobs

MODES = {
    "defaults": [],
    "all states, two inner epochs": [
        "states.mode=all",
        "train.inner_epochs=2",
        "teacher.offload_targets=true",
        "teacher.offload_weights=true",
        "optimizer.cpu_offload=true",
    ],
    "random masks, likelihood": ["states.mode=random_mask", "loss.kind=nll"],
    "shifted logits, mixed": [
        "loss.logit_shift=true",
        "loss.kind=mixed",
        "loss.reverse_weight=0.4",
        "rollout.responses_per_prompt=2",
    ],
    "recomputation, reverse": ["model.recompute=true", "loss.kind=reverse_kl"],
    "entropy bound, jsd": [
        "rollout.remasking=entropy_bounded",
        "rollout.entropy_bound=3.0",
        "loss.kind=jsd",
        "loss.exclude_eos=true",
        "rollout.top_k=9",
        "rollout.top_p=0.9",
    ],
    "top-k with a bucket, reshaped teacher": [
        "loss.top_k=4",
        "loss.top_k_tail=bucket",
        "teacher.temperature=0.8",
        "teacher.top_p=0.9",
    ],
    "bf16": ["model.dtype=bf16", "teacher.dtype=bf16"],
}


def train(models: TinyModels, prompts: Path, out: Path, *keys: str) -> list[dict[str, Any]]:
    model = models.hf("student", tied=True, layers=2)
    teacher = models.hf("teacher", tied=False, layers=2)
    short = ["train.steps=3", "checkpoint.every=3", f"teacher.path={teacher}"]
    jobs.train_run(training_run.overrides(model, prompts, out, *short, *keys))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_runs(models: TinyModels, prompts: Path, tmp_path: Path, mode: str):
    """Claim: three steps run, all numbers are finite, and counts agree with what was asked for."""
    keys = MODES[mode]
    rows = train(models, prompts, tmp_path / "run", *keys)
    assert [row["step"] for row in rows] == [1, 2, 3]
    responses = 2 if "rollout.responses_per_prompt=2" in keys else 1
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
        assert 0 < row["loss_tokens"] <= row["trained_tokens"]
        assert row["rollout_tokens"] <= 5 * responses * row["max_new_tokens"]
        assert 0 < row["tokens_per_forward"] <= row["tokens_per_denoising_step"] <= 4
        assert row["grad_norm"] > 0
    for key in ("trained_tokens", "rollout_tokens"):
        total = sum(row[key] for row in rows)
        assert rows[-1][f"cumulative_{key}"] == total


def test_the_form_of_the_targets_changes_nothing_but_the_work(
    models: TinyModels, prompts: Path, tmp_path: Path
):
    """Claim: kept entries in place of hidden states train the same student, over states and inner
    epochs that share them; the teacher's output layer is counted once instead of once a use."""
    keys = "loss.top_k=5", "loss.top_k_tail=bucket", "states.mode=all", "train.inner_epochs=2"
    more = "optimizer.warmup_steps=0", "teacher.offload_targets=true"
    hidden = train(models, prompts, tmp_path / "hidden", *keys, *more)
    kept = train(models, prompts, tmp_path / "kept", *keys, *more, "teacher.targets=top_k")
    for one, other in zip(hidden, kept, strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
        assert other["rollout_tokens"] == one["rollout_tokens"]
        assert other["cumulative_flops"] < one["cumulative_flops"]


def test_a_finished_training_is_a_model(models: TinyModels, prompts: Path, tmp_path: Path):
    """Claim: a training checkpoint can be the model of the next run; training moved it, and the
    first update at rate 0 did not."""
    start = models.hf("student", tied=True, layers=2)
    train(models, prompts, tmp_path / "one", "train.steps=1", "rollout.prompts_per_step=2")
    first = jobs.model_weights(tmp_path / "one" / "checkpoints" / "step_0000001")
    unchanged = jobs.model_weights(start)
    assert all((first[name] == unchanged[name]).all() for name in unchanged)
    train(models, prompts, tmp_path / "three")
    checkpoint = tmp_path / "three" / "checkpoints" / "step_0000003"
    assert any((jobs.model_weights(checkpoint)[n] != unchanged[n]).any() for n in unchanged)
    again = train(models, prompts, tmp_path / "again", f"model.path={checkpoint}")
    assert len(again) == 3
