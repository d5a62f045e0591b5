"""Qwen3-MoE on one rank: transformers' logits with and without renormalised routing, conversion bit
for bit, operations of the experts that work, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.model.experts import MixtureOfExperts
from megatron_opdlm.model.flops import forward_flops
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from megatron_opdlm.reporting import accounting
from megatron_opdlm.run import build
from tests import oracle
from tests.conftest import MASK, TinyModels
from tests.distributed import jobs

SEQUENCES = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 3, 30, 22], [11] * 6]


@pytest.mark.parametrize("renormalize", [True, False])
def test_logits_are_transformers(models: TinyModels, renormalize: bool):
    """Claim (law 1): softmax over all experts, the largest of them, scaled to sum 1 or not."""
    model_dir = models.experts("student", renormalize=renormalize)
    model = oracle.load(model_dir)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([s])).logits[0] for s in SEQUENCES]).numpy()
    found = jobs.causal_logits(Layout(), model_dir, SEQUENCES)
    assert found is not None and expected.std() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_weights_come_back_bit_for_bit(models: TinyModels):
    """Claim (law 1): every tensor of the file, each expert's and the router's, fills one parameter
    and is read back from there."""
    model_dir = models.experts("student")
    found = jobs.model_weights(model_dir)
    with open_weights(model_dir) as weights:
        names = list(weights.names())
        assert set(found) == set(names)
        assert "model.layers.1.mlp.experts.5.up_proj.weight" in names
        for name in names:
            assert np.array_equal(found[name], weights.get(name).numpy()), name


def test_operations_are_those_of_the_experts_that_work(models: TinyModels):
    """Claim: counted by hand for a token: attention, router, two experts of six, in two layers; in
    the last layer nothing after attention for a token that is not read."""
    shape = read_shape(models.experts("student"))
    attention = 64 * 32 * (4 + 2 + 2) + 4 * 32 * 64 + 2 * 32  # q, k, v, output; q and k norms
    mixture = 6 * 64 + 2 * 3 * 64 * 40
    body = 2 * (attention + mixture + 2 * 64) + 64
    assert shape.active_parameters == body + 2 * 67 * 64
    assert accounting.paper_flops(shape, 10) == 80 * shape.active_parameters
    one = forward_flops(shape, tokens=1, attended_pairs=0, projected_rows=0)
    assert one == 2 * body
    unread = forward_flops(shape, tokens=1, attended_pairs=0, projected_rows=0, read_rows=0)
    assert unread == 2 * (body - mixture - 4 * 32 * 64)


def test_no_loss_balances_the_experts(models: TinyModels):
    """Claim: the routers add nothing to the loss and drop no token."""
    model = jobs.load(Layout(), models.experts("student"))
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    assert len(mixtures) == 2
    for mixture in mixtures:
        assert not mixture.router.is_aux_loss_enabled()  # type: ignore[attr-defined]
        assert mixture.config.moe_z_loss_coeff is None
        assert mixture.config.moe_expert_capacity_factor is None


@pytest.mark.parametrize(
    ("keys", "ranks", "reason"),
    [
        (["model.expert_parallel=4"], 4, "expert_parallel=4 does not divide num_experts=6"),
        (["model.expert_parallel=3"], 4, "expert_parallel=3 does not divide the 4 ranks"),
        (["model.tensor_parallel=2"], 2, "need model.sequence_parallel=true"),
        (["lora.rank=2"], 1, "lora.targets holds linear_fc1, but model.path has experts"),
    ],
)
def test_what_experts_do_not_allow(models: TinyModels, keys: list[str], ranks: int, reason: str):
    """Claim: refused with one line before anything is built."""
    config = load_config(None, [f"model.path={models.experts('student')}", *mask_keys(), *keys])
    with pytest.raises(InputError, match=reason):
        build.open_pair(config, world_size=ranks)


def test_a_dense_model_has_no_experts_to_share(models: TinyModels):
    """Claim: expert ranks without experts are refused."""
    path: Path = models.hf("student", tied=True, layers=2)
    config = load_config(None, [f"model.path={path}", *mask_keys(), "model.expert_parallel=2"])
    with pytest.raises(InputError, match="expert_parallel=2 shares out experts"):
        build.open_pair(config, world_size=2)


def mask_keys() -> list[str]:
    return [f"model.mask_token_id={MASK}", "data.path=prompts.jsonl", "train.out=out"]
