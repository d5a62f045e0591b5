"""What the choice of hardware sets, in a process of its own where it has to be pretended."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import cpu, gpu, select_hardware
from tests.forking import REPOSITORY

# A GPU as far as the choice of hardware asks for one; Transformer Engine and Apex are not here.
PROGRAM = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (9, 0)
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda device: "pretended"
torch.cuda.set_device = lambda device: None
before = torch.get_float32_matmul_precision()
import megatron_opdlm.hardware
from megatron.core import optimizer as o
from megatron.core.optimizer import distrib_optimizer as d
print(before, torch.get_float32_matmul_precision())
print(o.Adam.__name__, d.Adam.__name__, o.USING_PYTORCH_OPTIMIZER, d.HAVE_APEX_OR_TE)
"""


def test_a_gpu_without_fused_kernels_in_an_image_that_asks_for_tf32():
    """Claim: products of float32 are in float32, though NGC's images ask PyTorch for TF32. Where
    Megatron finds neither Transformer Engine nor Apex, it gets the Adam that CPUs get: with torch's
    own a run trains and saves but cannot be resumed, since ``DistributedOptimizer.state_dict``
    (megatron/core/optimizer/distrib_optimizer.py), which loading calls before there is any state,
    asserts ``len(steps) == 1`` where ``not HAVE_APEX_OR_TE``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=REPOSITORY,
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["high highest", "GroupAdam GroupAdam False True"]


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (4, 4, None)]
)
def test_the_gpu_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, expected: int | None
):
    """Claim: a rank takes the GPU of its number on the machine, or the only one that it is shown,
    as by Slurm's ``--gpus-per-task=1``; too few are named."""
    bound: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    if expected is None:
        with pytest.raises(InputError, match="LOCAL_RANK=4, but this process sees 4 GPUs"):
            gpu.set_device(local_rank)
        return
    assert gpu.set_device(local_rank) == torch.device("cuda", expected)
    assert bound == [expected]


def test_captures_share_a_stream(monkeypatch: pytest.MonkeyPatch):
    """Claim: however many forwards are captured, one stream is made for their first runs."""
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(object()) or made[-1])
    gpu._side_stream.cache_clear()
    try:
        assert gpu._side_stream() is gpu._side_stream()
    finally:
        gpu._side_stream.cache_clear()
    assert len(made) == 1


def test_a_processor_that_multiplies_in_bfloat16(tmp_path: Path):
    """Claim: the first that ``/proc/cpuinfo`` names counts, AMX before AVX512; none, an unknown
    system or a similar name count as none."""
    file = tmp_path / "cpuinfo"
    for flags, expected in (
        ("fpu avx512_bf16 avx2", "avx512_bf16"),
        ("avx512_bf16 amx_tile amx_bf16", "amx_bf16"),
        ("avx512f xavx512_bf16", ""),
    ):
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags : fpu\n")
        assert cpu.bfloat16_unit(file) == expected
    assert cpu.bfloat16_unit(tmp_path / "nowhere") == ""


def test_large_models_take_the_fast_type():
    """Claim: ``auto`` is the large models' type from 50 million parameters on."""
    machine = replace(select_hardware(), dtype=torch.float32, large_dtype=torch.bfloat16)
    assert machine.dtype_of(49_999_999) is torch.float32
    assert machine.dtype_of(50_000_000) is torch.bfloat16
