"""What makes decoding on a CPU faster changes nothing: products with weights laid out once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_opdlm.hardware import cpu
from megatron_opdlm.model import decode_products
from megatron_opdlm.model.decode_products import laid_out_weights
from megatron_opdlm.model.gpt import build_model
from megatron_opdlm.model_files.families import QWEN2
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.parallel import Layout
from tests.distributed import jobs


@pytest.mark.skipif(not cpu.bfloat16_unit(), reason="the processor has no bfloat16 products")
def test_laid_out_products_are_torchs():
    """Claim: equal bit for bit, whatever the number of rows; float32 weights stay where they
    are."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    product = cpu.laid_out(weight)
    assert product is not None
    for rows in (0, 1, 5, 64, 200):
        x = torch.randn(rows, 1, 64, generator=generator).bfloat16()
        assert torch.equal(product(x), x @ weight.t())
    assert cpu.laid_out(weight.float()) is None


def test_linears_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch):
    """Claim: within the context every linear of the layers multiplies by its weight of now, laid
    out, and adds its bias; afterwards, also after a failure, by its own again. Where memory is
    short nothing is laid out."""
    hardware = jobs.join(Layout())
    shape = ModelShape(1, 32, 4, 2, 8, 64, 65, True, 1e6, 1e-6, 64, family=QWEN2)
    model = build_model(shape, Layout(), torch.bfloat16, hardware)
    layer: Any = model.decoder.layers[0]
    linear = layer.self_attention.linear_qkv
    x = torch.randn(3, 1, 32).bfloat16()
    for seed in (1, 2):  # an update lies between two rollouts
        with torch.no_grad():
            torch.manual_seed(seed)
            linear.weight.copy_(torch.randn(linear.weight.shape))
            linear.bias.copy_(torch.randn(linear.bias.shape))
        expected, _ = linear(x)
        with pytest.raises(KeyError), torch.inference_mode(), laid_out_weights(model):
            assert ("_forward_impl" in vars(linear)) == bool(cpu.bfloat16_unit())
            assert torch.equal(linear(x)[0], expected)
            raise KeyError
        assert "_forward_impl" not in vars(linear)
    short = replace(hardware, free_memory_bytes=lambda: linear.weight.nbytes)
    monkeypatch.setattr(decode_products, "select_hardware", lambda: short)
    with laid_out_weights(model):
        assert "_forward_impl" not in vars(linear)
