"""Claims: what computes a model follows from the hardware and its type, and what cannot run is
refused in one line with value, rule and remedy."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config import Config, load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware, select_hardware
from megatron_opdlm.model.decode_choice import choose_decode_attention
from megatron_opdlm.model.kernels import Kernels, choose_kernels
from megatron_opdlm.run import build
from tests.conftest import MASK, TinyModels

CPU = replace(
    select_hardware(),
    device=torch.device("cpu"),
    transformer_engine=None,
    differentiates_flex=False,
)
GPU = replace(CPU, device=torch.device("meta"), dtype=torch.bfloat16, differentiates_flex=True)
GPU_WITH_TE = replace(GPU, transformer_engine="2.9.0")


@pytest.mark.parametrize(
    ("hardware", "dtype", "student", "teacher"),
    [
        (CPU, torch.float32, ("local", "dense"), ("local", "dense")),
        (CPU, torch.bfloat16, ("local", "dense"), ("local", "dense")),
        (GPU, torch.bfloat16, ("local", "flex"), ("local", "flex")),
        (GPU_WITH_TE, torch.bfloat16, ("te", "flex"), ("te", "te")),
        # Transformer Engine would round float32 to TF32.
        (GPU_WITH_TE, torch.float32, ("local", "flex"), ("local", "flex")),
    ],
)
def test_auto(hardware: Hardware, dtype: torch.dtype, student: tuple, teacher: tuple):
    for causal, expected in ((False, student), (True, teacher)):
        found = choose_kernels("auto", "auto", dtype, hardware, causal=causal)
        assert (found.spec, found.attention) == expected


def test_named_kernels_are_taken():
    found = choose_kernels("local", "te", torch.bfloat16, GPU_WITH_TE, causal=False)
    assert found == Kernels(spec="local", attention="te")
    found = choose_kernels("te", "dense", torch.bfloat16, GPU_WITH_TE, causal=True)
    assert found == Kernels(spec="te", attention="dense")


@pytest.mark.parametrize(
    ("spec", "attention", "dtype", "hardware", "reason"),
    [
        ("auto", "flex", torch.float32, CPU, "backend=flex cannot train here.*no backward.*dense"),
        ("auto", "te", torch.bfloat16, CPU, "backend=te needs Transformer Engine.*backend=auto"),
        ("te", "auto", torch.bfloat16, GPU, "spec=te needs Transformer Engine.*spec=auto"),
        ("te", "auto", torch.float32, GPU_WITH_TE, "spec=te computes in 16 bits.*spec=local"),
        ("auto", "te", torch.float32, GPU_WITH_TE, "backend=te computes in 16.*backend=flex"),
    ],
)
def test_refusals(spec: str, attention: str, dtype: torch.dtype, hardware: Hardware, reason: str):
    with pytest.raises(InputError, match=reason) as refused:
        choose_kernels(spec, attention, dtype, hardware, causal=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["attention.backend=flex", "attention.backend=te", "model.spec=te"])
def test_refused_before_anything_is_built(models: TinyModels, key: str):
    hf_dir = models.hf("student", tied=True, layers=2)
    config = load_config(None, [f"model.path={hf_dir}", f"model.mask_token_id={MASK}", key])
    if select_hardware().device.type == "cpu":
        with pytest.raises(InputError, match=key):
            build.open_pair(config)


def test_types_of_student_and_teacher_count_apart():
    config = load_config(None, ["teacher.dtype=fp32"])
    student, teacher = build.kernels_of(config, GPU_WITH_TE)
    assert (student.spec, student.attention) == ("te", "flex")
    assert (teacher.spec, teacher.attention) == ("local", "flex")


def test_one_line_for_the_log(tmp_path: Path):
    line = build.describe_kernels(Config(), GPU_WITH_TE)
    assert line.startswith(
        "kernels: student te layers with flex attention; teacher te layers with te attention; "
    )
    assert "2.9.0" in line and "\n" not in line
    assert "no backward pass" in build.describe_kernels(Config(), CPU)


GPU_DECODING = replace(GPU, decode_attention=("triton", "flash", "rows"))


def test_what_attends_while_decoding(monkeypatch: pytest.MonkeyPatch):
    """Claim: a kernel is chosen because it can be imported and takes this type and head size, in
    the hardware's order, and the line for the log says what ruled the others out; one that was
    asked for and cannot run is refused."""
    bf16 = torch.bfloat16
    flash = types.ModuleType("flash_attn")
    vars(flash)["flash_attn_with_kvcache"] = lambda *args, **kwargs: None
    own = types.ModuleType("megatron_opdlm.model.decode_kernel")
    vars(own)["attend"] = lambda *args: None

    def chosen(name: str, dtype: torch.dtype, width: int, hardware: Hardware = GPU_DECODING) -> str:
        return str(choose_decode_attention(name, dtype, width, hardware))

    monkeypatch.setitem(sys.modules, "megatron_opdlm.model.decode_kernel", own)
    assert chosen("auto", bf16, 128) == "decoding by triton (preferred here)"
    assert chosen("auto", torch.float32, 128).startswith("decoding by triton")
    # a package of that name that has no kernel, and one that cannot be loaded
    for broken in (types.ModuleType("flash_attn"), None):
        monkeypatch.setitem(sys.modules, "flash_attn", broken)
        with pytest.raises(InputError, match=r"attention=flash cannot run here: flash-attn cannot"):
            chosen("flash", bf16, 128)
    monkeypatch.setitem(sys.modules, "megatron_opdlm.model.decode_kernel", None)
    assert "triton cannot be imported" in chosen("auto", bf16, 128)
    assert chosen("auto", bf16, 128).startswith("decoding by rows")
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    assert chosen("auto", bf16, 128).startswith("decoding by flash")
    assert chosen("auto", torch.float32, 128).startswith("decoding by rows")
    assert chosen("auto", bf16, 100).startswith("decoding by rows")
    assert chosen("auto", bf16, 512).startswith("decoding by rows")
    assert chosen("auto", bf16, 128, CPU) == "decoding by buckets (preferred here)"
    with pytest.raises(InputError, match="needs a GPU; use rollout"):
        chosen("triton", bf16, 128, CPU)
