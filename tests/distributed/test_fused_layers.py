"""Models built from Megatron's Transformer Engine spec with our attention and our layer in it. The
layers are stand-ins (fused_layers.py), since Transformer Engine needs a GPU: names, gradients,
layouts and checkpoints are the real thing, its kernels are not here.
"""

from pathlib import Path

import pytest
import torch

from checkpoint_tools.streaming.megatron_weights import read_weights
from megatron_opdlm.model.attention_plan import causal_plan
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.model_files.names import hf_from_megatron
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from tests import oracle, training_run
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.distributed.fused_layers import fused_layers, replay_fused, train_fused
from tests.distributed.layouts import LAYOUTS, overrides
from tests.distributed.workers import WorkerGroups
from tests.end_to_end.test_resume import assert_same_steps, cut_back
from tests.recorded import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    PLAIN,
    SHIFTED,
    Case,
    Recorded,
    distance,
    length,
)


@pytest.fixture(scope="module")
def recorded(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(models, tmp_path_factory.mktemp("recorded"))


def assert_expected(found: dict, expected: dict) -> None:
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=LOSS_TOLERANCE)
    if found["gradients"] is not None:
        gap = distance(found["gradients"], expected["gradients"])
        assert gap < GRADIENT_TOLERANCE * length(expected["gradients"])


@torch.no_grad()
def test_parameters_are_fused(models: TinyModels):
    """Claim (that the tests below are no empty ones): norms live in the linears, modules have extra
    states, and logits are those of transformers all the same."""
    hf_dir, ids = models.hf("student", tied=True), torch.tensor([3, 1, 4, 1, 5, 9])
    with fused_layers():
        model = jobs.load(Layout(), hf_dir, kernels=Kernels(spec="te"))
        hidden = model.run(ids, torch.arange(6), causal_plan([6], 6, torch.device("cpu")))
        logits = torch.from_numpy(jobs.whole_logits(model, hidden.flatten(0, 1)))
    names = {name for name, _ in model.named_parameters()}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in names
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in names)
    assert "decoder.final_layernorm._extra_state" in model.state_dict()
    expected = oracle.causal_logits(oracle.load(hf_dir), ids.tolist())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [PLAIN, SHIFTED], ids=lambda case: case.name)
def test_losses_and_gradients(recorded: Recorded, case: Case):
    """Claim: a checkpoint of Megatron's own layers, read by fused ones, gives the losses and
    gradients of plain PyTorch."""
    keys = [*recorded.overrides(case), "update.tokens_per_microbatch=110"]
    assert_expected(replay_fused(keys, recorded.file(case)), recorded.expected(case))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "tp2-sp", "pp2"])
def test_on_layouts(recorded: Recorded, ranks: WorkerGroups, name: str):
    """Claim: the same on layouts: a fused norm counts once in the gradient norm and its gradient is
    summed over the ranks that see parts of the row."""
    number, layout = LAYOUTS[name]
    found = ranks(number).run(
        replay_fused,
        overrides=[*recorded.overrides(PLAIN), *overrides(layout)],
        trajectories=recorded.file(PLAIN),
    )
    for one in found:
        assert_expected(one, recorded.expected(PLAIN))


def test_checkpoints_are_interchangeable(models: TinyModels, tmp_path: Path):
    """Claim: a run of Megatron's own layers resumed with fused ones, and that resumed with its own
    again, report the steps of the undisturbed run; what the fused layers saved is read without
    them, tensor by tensor under Hugging Face's names."""
    model = models.hf("student", tied=True, layers=2)
    prompts = training_run.write_prompts(tmp_path / "prompts.jsonl")
    plain = tmp_path / "plain"
    jobs.train_run(training_run.overrides(model, prompts, plain))
    fused = cut_back(plain, tmp_path / "fused", 4)
    train_fused(training_run.overrides(model, prompts, fused))
    assert_same_steps(training_run.metrics(fused), training_run.metrics(plain))
    back = cut_back(fused, tmp_path / "back", 6)
    jobs.train_run(training_run.overrides(model, prompts, back))
    assert_same_steps(training_run.metrics(back), training_run.metrics(plain))
    shape = read_shape(model)
    for step, exact in ((4, True), (6, False)):
        stored = []
        for run in (plain, fused):
            checkpoint = run / "checkpoints" / f"step_{step:07d}"
            read_manifest(checkpoint)
            stored.append(dict(hf_from_megatron(shape, read_weights(checkpoint, shape))))
        assert stored[0].keys() == stored[1].keys()
        for name, tensor in stored[0].items():
            close = 0.0 if exact else 1e-3
            torch.testing.assert_close(stored[1][name], tensor, atol=close, rtol=close)
