"""Claim: layers with the kernels that a GPU's record fuses (SwiGLU; with Transformer Engine the
rotation of queries and keys) and with torch's fused norm compute what plain ones do: hidden states
and gradients, dense and with experts. Which of them a record has follows from Transformer Engine.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_opdlm.checkpoint import load_model
from megatron_opdlm.hardware import Hardware, cpu, gpu
from megatron_opdlm.model import layer_spec
from megatron_opdlm.model.attention_plan import causal_plan
from megatron_opdlm.model.gpt import build_model, transformer_config
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs

# isort: split
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import mlp

FUSED = ("bias_activation_fusion", "apply_rope_fusion")
# Fields of a GPU's record that a CPU could not follow.
FOLLOWS = {"use_cpu_initialization": True}


def rotate(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """Stands in for Transformer Engine's kernel: its rules for what it is given, and Su et al.'s
    rotation of the pairs (i, i + d / 2).
    """
    tokens, width = t.shape[0], t.shape[-1]
    assert t.dim() == 4 and freqs.shape == (tokens, 1, 1, width) and freqs.dtype is torch.float32
    assert not interleaved
    half = width // 2
    angle = freqs[..., :half]
    first, second = t[..., :half].float(), t[..., half:].float()
    turned = (
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    )
    return torch.cat(turned, dim=-1).to(t.dtype)


def plain_norm(norm: layer_spec.RMSNorm, x: Tensor) -> Tensor:
    """The formula, operation by operation."""
    h = x.float()
    return norm.weight * (h / (h.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()).to(x.dtype)


def of_a_gpu(engine: str | None, hardware: Hardware) -> Hardware:
    options = {**gpu.transformer_options(engine), **FOLLOWS}
    return replace(hardware, transformer_options=options, transformer_engine=engine)


def plain(hardware: Hardware) -> Hardware:
    options = {**hardware.transformer_options, **dict.fromkeys(FUSED, False)}
    return replace(hardware, transformer_options=options)


def test_the_record_of_a_gpu(models: TinyModels, monkeypatch: pytest.MonkeyPatch):
    """Claim: Megatron accepts a GPU's record with and without Transformer Engine, whose rotation is
    asked for only where it is; a CPU asks for the activation, and nobody for what leaves
    nothing to fuse."""
    shape = read_shape(models.hf("student", tied=True, layers=2))
    hardware = jobs.join(Layout())
    for engine, kernel in ((None, None), ("2.9.0", rotate)):
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", kernel)
        record = of_a_gpu(engine, hardware)
        config = transformer_config(shape, Layout(), torch.bfloat16, record, recompute="false")
        assert config.bias_activation_fusion
        assert config.apply_rope_fusion == (engine is not None)
        assert not (config.bias_dropout_fusion or config.masked_softmax_fusion)
        assert not config.gradient_accumulation_fusion
    fused = {name for name in FUSED if cpu.TRANSFORMER_OPTIONS[name]}
    assert fused == {"bias_activation_fusion"}


def outcome(hardware: Hardware, model_dir: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Final hidden states of two packed sequences, and the gradient of a sum of them by every
    weight.
    """
    model = build_model(read_shape(model_dir), Layout(), dtype, hardware)
    load_model(model, model_dir)
    lengths = (9, 14)
    tokens = torch.arange(sum(lengths), device=hardware.device) * 7 % 50
    places = torch.cat([torch.arange(n) for n in lengths]).to(hardware.device)
    hidden = model.run(tokens, places, causal_plan(lengths, len(tokens), hardware.device))
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (hidden.float() * weight.to(hardware.device)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("layernorm" in name for name in gradients)
    return {"hidden": hidden.detach(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].float() - value.float()).norm()
        assert difference < tolerance * value.float().norm(), name


def test_fused_layers_on_a_cpu(models: TinyModels, monkeypatch: pytest.MonkeyPatch):
    """Claim: with a stand-in for Transformer Engine's rotation and Megatron's functions as they
    are, and with a CPU's own, float32, to rounding; every layer rotates queries and keys by it."""
    rotated: list[torch.Size] = []

    def counting(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
        rotated.append(t.shape)
        return rotate(t, freqs, interleaved)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", counting)
    hardware = jobs.join(Layout())
    for model_dir in (models.hf("student", tied=False, layers=2), models.experts("student")):
        own = outcome(hardware, model_dir, torch.float32)
        assert not rotated
        with monkeypatch.context() as context:
            context.setattr(mlp, "bias_swiglu_impl", fused_bias_swiglu.bias_swiglu_impl)
            found = outcome(of_a_gpu("2.9.0", hardware), model_dir, torch.float32)
        assert len(rotated) == 2 * 2
        with monkeypatch.context() as context:
            context.setattr(layer_spec.RMSNorm, "forward", plain_norm)
            expected = outcome(plain(hardware), model_dir, torch.float32)
        assert_same(found, expected, 1e-5)
        assert_same(own, expected, 1e-5)
        rotated.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_fused_layers_on_a_gpu(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
):
    """Claim: the same with this machine's record and kernels. In bfloat16 (8 bits) plain operations
    round after each, the fused ones once: two layers of them are some units of 2^-8 apart."""
    hardware = jobs.join(Layout())
    for model_dir in (models.hf("student", tied=False, layers=2), models.experts("student")):
        found = outcome(hardware, model_dir, dtype)
        with monkeypatch.context() as context:
            context.setattr(layer_spec.RMSNorm, "forward", plain_norm)
            expected = outcome(plain(hardware), model_dir, dtype)
        assert_same(found, expected, tolerance)
