"""What makes decoding on a CPU faster changes nothing: products with weights laid out once."""

from typing import Any

import pytest
import torch

from megatron_opdlm.hardware import cpu
from megatron_opdlm.model.decode_products import laid_out_weights
from megatron_opdlm.model.gpt import build_model
from megatron_opdlm.model.vocab_parallel import project
from megatron_opdlm.model_files.families import QWEN2
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.parallel import Layout
from tests.distributed import jobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_laid_out_products_are_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Claim: equal bit for bit, whatever the number of rows; small weights, those in float32, and
    all where memory is short, stay as they are."""
    monkeypatch.setattr(cpu, "LEAST_LAID_OUT", 96 * 64)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    product, small = cpu.laid_out([weight, weight[1:]])
    assert small is None and (product is not None) == cpu.lays_out(dtype)
    for rows in (0, 1, 5, 64, 200) if product else ():
        x = torch.randn(rows, 1, 64, generator=generator).to(dtype)
        assert product is not None and torch.equal(product(x), x @ weight.t())
    monkeypatch.setattr(cpu, "laid_out_limit", lambda: weight.nbytes - 1)
    assert cpu.laid_out([weight]) == [None]


@pytest.mark.skipif(not cpu.bfloat16_unit(), reason="the processor has no bfloat16 products")
def test_linears_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch):
    """Claim: within the context every linear of the layers multiplies by its weight of now, laid
    out, and adds its bias, and so does the output layer; afterwards, also after a failure, by its
    own again."""
    monkeypatch.setattr(cpu, "LEAST_LAID_OUT", 1)
    hardware = jobs.join(Layout())
    shape = ModelShape(1, 32, 4, 2, 8, 64, 65, True, 1e6, 1e-6, 64, family=QWEN2)
    model = build_model(shape, Layout(), torch.bfloat16, hardware)
    layer: Any = model.decoder.layers[0]
    linear = layer.self_attention.linear_qkv
    x = torch.randn(3, 1, 32).bfloat16()
    for seed in (1, 2):  # an update lies between two rollouts
        with torch.no_grad():
            torch.manual_seed(seed)
            for tensor in (linear.weight, linear.bias, model.head_weight):
                tensor.copy_(torch.randn(tensor.shape))
        expected, logits = linear(x)[0], project(x[:, 0], model.head_weight, model.shard)
        with pytest.raises(KeyError), torch.inference_mode(), laid_out_weights(model):
            assert "_forward_impl" in vars(linear) and model.head_product is not None
            assert torch.equal(linear(x)[0], expected)
            found = project(x[:, 0], model.head_weight, model.shard, None, model.head_product)
            assert torch.equal(found, logits)
            raise KeyError
        assert "_forward_impl" not in vars(linear) and model.head_product is None
