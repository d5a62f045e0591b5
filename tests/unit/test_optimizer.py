"""What the optimizer is asked for is refused where the machine or the model's type cannot do it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_opdlm import optimizer
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.optimizer import fuse_gradients, gradient_sums, optimizer_config

# isort: split
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import RowParallelLinear

NARROW = ["optimizer.exp_avg_dtype=bf16", "optimizer.main_params_dtype=fp16"]


def test_the_defaults_are_float32():
    made = optimizer_config(load_config(None, []), torch.bfloat16, select_hardware())
    assert not made.use_precision_aware_optimizer
    assert made.bf16 and made.use_distributed_optimizer
    assert {made.main_params_dtype, made.exp_avg_dtype, made.exp_avg_sq_dtype} == {torch.float32}


def test_narrow_states_are_refused_without_a_gpu():
    """Claim: one line with every value, the rule, the reason and the remedy."""
    hardware = select_hardware()
    if hardware.device.type != "cpu":
        pytest.skip("this machine may have what is claimed to be missing")
    expected = (
        "optimizer.main_params_dtype=fp16, optimizer.exp_avg_dtype=bf16 needs a GPU and "
        f"Transformer Engine's Adam, which are not here ({hardware.reason}); use fp32"
    )
    with pytest.raises(InputError) as error:
        optimizer_config(load_config(None, NARROW), torch.bfloat16, hardware)
    assert str(error.value) == expected


def test_narrow_states_beside_float32_weights(monkeypatch: pytest.MonkeyPatch):
    """Claim: they are for 16-bit models. The GPU and Transformer Engine are pretended."""
    monkeypatch.setattr(optimizer, "find_spec", lambda name: object())
    hardware = replace(select_hardware(), device=torch.device("cuda"))
    with pytest.raises(InputError, match="16 bits, but the student's type is fp32; use model"):
        optimizer_config(load_config(None, NARROW), torch.float32, hardware)


def test_gradients_are_fused_only_where_the_kernel_is(monkeypatch: pytest.MonkeyPatch):
    """Claim: Megatron's linears are told where Apex is, Transformer Engine's always, nothing else
    is touched, and what is said is of the layers that there are. Transformer Engine's linear hands
    its attribute to the kernel in every forward (transformer_engine/pytorch/module/linear.py,
    ``self.fuse_wgrad_accumulation``), so it may be set after the layer is made."""
    linear = RowParallelLinear.__new__(RowParallelLinear)
    torch.nn.Module.__init__(linear)
    fused: Any = torch.nn.Identity()
    fused.fuse_wgrad_accumulation = False
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), linear, fused)
    if not layers._grad_accum_fusion_available:
        fuse_gradients(model)
        assert not hasattr(linear, "gradient_accumulation_fusion")
        assert "Apex's fused kernel is not here" in gradient_sums("local")
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    fuse_gradients(model)
    assert linear.gradient_accumulation_fusion and fused.fuse_wgrad_accumulation
    assert not hasattr(model[0], "gradient_accumulation_fusion")
    assert gradient_sums("local") == "added to the float32 sums by Apex's fused kernel"
    assert "Transformer Engine" in gradient_sums("te") and "Apex" not in gradient_sums("te")
