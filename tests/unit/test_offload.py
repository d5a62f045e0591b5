"""What may wait in host memory. Moving it there and back needs a GPU: tests/parity/test_gpu.py."""

from dataclasses import replace

import pytest
import torch

from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.offload import check_optimizer_offload, layers_here
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs


def test_weights_that_are_the_models_own_stay():
    """Claim: float32 models on a GPU are refused (their optimizer steps the weights themselves);
    bf16 models there, and every model on a CPU, where nothing moves, are not."""
    cpu = select_hardware()
    gpu = replace(cpu, device=torch.device("cuda", 0))
    with pytest.raises(InputError, match=r"model\.dtype=fp32 .* use model\.dtype=bf16"):
        check_optimizer_offload(torch.float32, gpu)
    check_optimizer_offload(torch.bfloat16, gpu)
    check_optimizer_offload(torch.float32, cpu)


def test_layers_leave_again_after_an_error(models: TinyModels):
    """Claim: whatever happens while the teacher is asked, its layers do not stay on the device."""
    model = jobs.load(Layout(), models.hf("teacher", tied=False, layers=2))
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError), layers_here(model, torch.device("cpu"), on=True):
        raise RuntimeError
    assert [p.data_ptr() for p in model.parameters()] == before
    assert all(p.device.type == "cpu" for p in model.parameters())
