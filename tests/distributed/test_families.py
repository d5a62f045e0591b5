"""Laws 1 to 3 for the families beside Qwen3, whose biases and missing norms change what is split
and what is summed: logits, losses, gradients and rollouts on layouts, layers of either
specification,
low-rank terms. The cases are those of Qwen3 (tests/recorded.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_tools.streaming.megatron_weights import read_weights
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.model_files.names import hf_from_megatron
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs, lora_jobs
from tests.distributed.fused_layers import replay_fused
from tests.distributed.layouts import LAYOUTS, overrides
from tests.distributed.test_conversion import assert_same_logits, expected_logits, sequences
from tests.distributed.test_layout_invariance import (
    CLIP,
    LR,
    assert_gradients,
    assert_losses,
    assert_training,
    training_arguments,
)
from tests.distributed.test_lora import LORA, Adapted, assert_as_expected
from tests.distributed.workers import WorkerGroups
from tests.recorded import PLAIN, SHIFTED, Case, Recorded
from tests.tiny_requests import IDS, request

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KEYS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
}
DRAWN = Decoding(block_size=4, denoising_steps=3, temperature=1.0, top_k=20, top_p=0.9)


class Models:
    """A family's models and the cases recorded with them."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        self.models, self.folder = models, folder
        self.recorded = Recorded(models, folder)


@pytest.fixture(scope="module", params=KEYS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp(request.param)
    return Models(TinyModels(root, request.param, KEYS[request.param]), root)


def test_one_rank(family: Models):
    """Claim: gradients are those of transformers, biases' among them, with Megatron's own layers
    and with fused ones; so are three updates."""
    recorded = family.recorded
    expected = recorded.expected(PLAIN)
    assert all(np.any(g) for n, g in expected["gradients"].items() if "k_proj.bias" not in n)
    for replay in (jobs.replay_with_gradients, replay_fused):
        found = replay(recorded.overrides(PLAIN), recorded.file(PLAIN))
        assert_losses(found, expected)
        assert_family_gradients(found["gradients"], expected["gradients"])
    found = jobs.train_on(**training_arguments(recorded, PLAIN, []))
    assert_training(found, recorded.expected_training(PLAIN, LR, CLIP))


def assert_family_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """A key's bias moves all scores of a query alike, so that only rotation lets it change
    anything:
    its gradient is small beside the others', and compared with theirs."""
    small = {name for name in expected if name.endswith("k_proj.bias")}
    largest = max(float(np.linalg.norm(g)) for g in expected.values())
    for name in small:
        assert np.linalg.norm(found[name] - expected[name]) < 1e-5 * largest
    rest = [{n: g for n, g in grads.items() if n not in small} for grads in (found, expected)]
    assert_gradients(*rest)


def test_low_rank_terms(family: Models):
    """Claim: beside biases and without norms of queries and keys, too."""
    adapted = Adapted(family.recorded, family.models, family.folder)
    keys = [*adapted.overrides(PLAIN), *LORA]
    found = lora_jobs.replay_with_gradients(keys, family.recorded.file(PLAIN))
    assert_as_expected([found], adapted.expected(PLAIN))
    shape = read_shape(family.models.hf("student", tied=False))
    read = hf_from_megatron(shape, read_weights(adapted.checkpoint(PLAIN), shape))
    loaded = jobs.model_weights(adapted.checkpoint(PLAIN))
    assert all(np.array_equal(loaded[name], tensor.numpy()) for name, tensor in read)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "case"),
    [("tp2", PLAIN), ("tp2-sp", SHIFTED), ("pp2", SHIFTED), ("cp2", PLAIN)],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_layouts(family: Models, ranks: WorkerGroups, name: str, case: Case):
    """Claim: logits, losses, gradients and rollouts of a checkpoint are the same on layouts."""
    number, layout = LAYOUTS[name]
    group, recorded = ranks(number), family.recorded
    found = group.run(
        jobs.replay_with_gradients,
        overrides=[*recorded.overrides(case), *overrides(layout)],
        trajectories=recorded.file(case),
    )
    expected = recorded.expected(case)
    for one in found:
        assert_losses(one, expected)
    assert_family_gradients(found[0]["gradients"], expected["gradients"])
    model_dir = family.models.imported("student", tied=case.tied)
    if layout.context == 1:
        logits = group.run(
            jobs.causal_logits, layout=layout, model_dir=model_dir, sequences=sequences()
        )
        hf_dir = family.models.hf("student", tied=case.tied)
        assert_same_logits(logits[-1], expected_logits(hf_dir))
    asked = [request(i, 1 + (5 * i) % 11, limit=2 + (7 * i) % 9) for i in range(5)]
    arguments = {"requests": asked, "decoding": DRAWN, "vocabulary": IDS, "model_dir": model_dir}
    expected_rollouts = jobs.roll_out(Layout(), **arguments)
    assert group.run(jobs.roll_out, layout=layout, **arguments) == [expected_rollouts] * number
