"""Qwen3-MoE keeps the laws on every layout, expert parallelism included: logits (law 1), what
training sees (law 2), losses, gradients, updates and tokens (law 3). What is expected comes from
transformers' Qwen3-MoE and PyTorch alone.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.parallel import Layout
from tests import oracle
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import EXPERT_LAYOUTS, overrides
from tests.distributed.test_layout_invariance import (
    CLIP,
    LR,
    assert_gradients,
    assert_losses,
    assert_training,
    training_arguments,
)
from tests.distributed.workers import WorkerGroups
from tests.recorded import PLAIN, Recorded
from tests.tiny_requests import IDS, request

PATIENCE = 300  # seconds of a job on a busy machine
FOUR = [name for name, (number, _) in EXPERT_LAYOUTS.items() if number == 4]
TWO = [name for name in EXPERT_LAYOUTS if name not in FOUR]
LAYOUTS = [*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in FOUR)]
MIXTURE = replace(PLAIN, name="experts")

pytestmark = pytest.mark.distributed


class ExpertModels:
    """Gives ``Recorded`` models with experts, read from Hugging Face's files."""

    def __init__(self, models: TinyModels) -> None:
        self._models = models

    def hf(self, role: str, *, tied: bool) -> Path:
        return self._models.experts(role)

    imported = hf


@pytest.fixture(scope="module")
def recorded(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    experts: Any = ExpertModels(models)
    return Recorded(experts, tmp_path_factory.mktemp("recorded-experts"))


SEQUENCES = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 3, 30, 22], [11] * 6]


def expected_logits(model_dir: Path) -> np.ndarray:
    model = oracle.load(model_dir)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([s])).logits[0] for s in SEQUENCES]).numpy()


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits(models: TinyModels, ranks: WorkerGroups, name: str):
    """Claim (law 1): logits are transformers' to 1e-4 on every layout."""
    number, layout = EXPERT_LAYOUTS[name]
    model_dir = models.experts("student")
    results = ranks(number).run(
        jobs.causal_logits,
        layout=layout,
        model_dir=model_dir,
        sequences=SEQUENCES,
        timeout=PATIENCE,
    )
    expected = expected_logits(model_dir)
    found = [logits for logits in results if logits is not None]
    assert found and expected.std() > 1
    for logits in found:
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients(recorded: Recorded, ranks: WorkerGroups, name: str):
    """Claim (law 3): losses, gradient norm and every gradient, the router's and each expert's
    included, agree to 1e-5; replicas have different numbers of rows, and rows are recomputed."""
    number, layout = EXPERT_LAYOUTS[name]
    recompute = "mlp" if "ep2" in name else "true"
    keys = ["update.tokens_per_microbatch=60", f"model.recompute={recompute}"]
    results = ranks(number).run(
        jobs.replay_with_gradients,
        overrides=[*recorded.overrides(MIXTURE), *overrides(layout), *keys],
        trajectories=recorded.file(MIXTURE),
        timeout=PATIENCE,
    )
    expected = recorded.expected(MIXTURE)
    assert all(np.any(g) for g in expected["gradients"].values()), "an expert without a token"
    for found in results:
        assert_losses(found, expected)
    assert_gradients(results[0]["gradients"], expected["gradients"])


@pytest.mark.parametrize("name", ["ep2", *(n for n in LAYOUTS if n not in TWO)])
def test_three_updates(recorded: Recorded, ranks: WorkerGroups, name: str):
    """Claim (law 3): clipping and Adam over dense and expert weights are PyTorch's, also where sums
    of gradients overlap the backward pass."""
    number, layout = EXPERT_LAYOUTS[name]
    results = ranks(number).run(
        jobs.train_on,
        **training_arguments(recorded, MIXTURE, overrides(layout)),
        overlapped=name == "ep2",
        timeout=PATIENCE,
    )
    assert_training(results[0], recorded.expected_training(MIXTURE, LR, CLIP))


def test_fewer_sequences_than_expert_ranks(recorded: Recorded, ranks: WorkerGroups, tmp_path: Path):
    """Claim: a replica without sequences keeps step with the one that has some."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(recorded.rows(MIXTURE)[0]) + "\n")
    keys = recorded.overrides(MIXTURE)
    alone = jobs.replay_with_gradients(keys, path)
    _, layout = EXPERT_LAYOUTS["ep2"]
    for found in ranks(2).run(
        jobs.replay_with_gradients,
        overrides=[*keys, *overrides(layout)],
        trajectories=path,
        timeout=PATIENCE,
    ):
        assert_losses(found, alone)


@pytest.mark.parametrize("attention", ["buckets", "rows"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("count", [1, 7])
def test_rollouts(models: TinyModels, ranks: WorkerGroups, name: str, attention: str, count: int):
    """Claim (law 3): tokens do not depend on the layout, although ranks that share experts keep
    step: with more work than slots, and where one of them has none at all."""
    number, layout = EXPERT_LAYOUTS[name]
    arguments: dict[str, Any] = {
        "model_dir": models.experts("student"),
        "requests": [request(i, 1 + (5 * i) % 11, limit=2 + (7 * i) % 9) for i in range(count)],
        "decoding": Decoding(block_size=4, denoising_steps=3, temperature=1.0, top_k=20),
        "vocabulary": IDS,
    }
    expected = jobs.roll_out(Layout(), **arguments)
    options: dict[str, Any] = {"slots": 3, "attention": attention, "graphs": True}
    results = ranks(number).run(
        jobs.roll_out, layout=layout, **arguments, **options, timeout=PATIENCE
    )
    for found in results:
        assert found == expected


@pytest.mark.parametrize("name", ["ep2", "tp2-sp"])
def test_on_policy(models: TinyModels, ranks: WorkerGroups, name: str):
    """Claim (law 2): training sees what the rollout saw; under tensor parallelism the rollout sends
    every token once through the experts' shards, training gathers them."""
    number, layout = EXPERT_LAYOUTS[name]
    results = ranks(number).run(
        jobs.on_policy_gap,
        layout=layout,
        model_dir=models.experts("student"),
        requests=[request(i, 2 + i, limit=9) for i in range(7)],
        decoding=Decoding(block_size=4, denoising_steps=3, temperature=1.0),
        vocabulary=IDS,
        slots=4,
        timeout=PATIENCE,
    )
    for found in results:
        assert found is not None and found["spread"] > 1
        assert found["gap"] < 1e-4
