"""Attention backends and layers of either spec on a CUDA device, gradients included. Not run on a
GPU yet.

bfloat16 keeps 8 bits of each number, 0.4 %: backends are compared with float64 sums, and a kernel
may be twice as far from them as PyTorch's own in the same type.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_opdlm.checkpoint import load_weights, save_weights
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model import flex_attention
from megatron_opdlm.model.attention_plan import causal_plan
from megatron_opdlm.model.dense_attention import attend, attend_bucketed, bucketed
from megatron_opdlm.model.flex_attention import attend_flex, compiled_kernel, flex_mask
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model.packed_row import PackedRow
from megatron_opdlm.model.weights import load_hf
from megatron_opdlm.model_files.manifest import huggingface_dir
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.parity.test_attention import expected_attention, two_stream

# isort: split
from megatron_opdlm.model_files.shape import read_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [(200, 120), (33, 21), (0, 4)]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_the_gpu(row: PackedRow) -> PackedRow:
    return PackedRow(
        lengths=row.lengths,
        tokens=row.tokens,
        device=torch.device("cuda"),
        block=row.block,
        clean=row.clean,
    )


def sums_and_gradients(attend: Attend, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "groups", "width"), [(16, 8, 128), (6, 2, 64)])
@pytest.mark.parametrize("mask", ["two-stream", "causal"])
def test_flex(dtype: torch.dtype, heads: int, groups: int, width: int, mask: str):
    """Claim: compiled FlexAttention's sums and gradients are those of the definition, as near as
    dense attention's."""
    packed = two_stream(LENGTHS, tail=3)
    visible = packed.expected_mask()
    if mask == "causal":
        sequence = torch.tensor(packed.sequence)
        visible = (sequence[:, None] == sequence).tril() & (sequence >= 0) | torch.eye(
            len(sequence), dtype=torch.bool
        )
        packed.row = PackedRow(
            lengths=packed.row.lengths, tokens=packed.row.tokens, device=packed.row.device
        )
    row = on_the_gpu(packed.row)
    generator = torch.Generator("cuda").manual_seed(5)
    shapes = [(row.tokens, n, width) for n in (heads, groups, groups, heads)]
    *inputs, weight = (
        torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes
    )
    weight[torch.tensor(packed.sequence) < 0] = 0  # nobody reads the tail
    real = (torch.tensor(packed.sequence) >= 0).cuda()
    visible = visible.cuda()
    exact = sums_and_gradients(
        lambda q, k, v: expected_attention(q, k, v, visible), [x.double() for x in inputs], weight
    )
    dense = sums_and_gradients(
        lambda q, k, v: attend_bucketed(q, k, v, bucketed(row), attend), inputs, weight
    )
    made = flex_mask(row)
    flex = sums_and_gradients(
        lambda q, k, v: attend_flex(q, k, v, made, width**-0.5), inputs, weight
    )
    for found, near, right in zip(flex, dense, exact, strict=True):
        allowed = 2 * float((near.double() - right)[real].abs().max()) + 1e-5
        assert float((found.double() - right)[real].abs().max()) < allowed


def test_ragged_rows_share_a_compilation():
    """Claim: a row of another length and another mask, of the same padded size, is not compiled
    again."""
    counted = []
    for lengths in ([(100, 60)], [(90, 81), (5, 4)], [(31, 24), (99, 30)]):
        row = on_the_gpu(two_stream(lengths).row)
        x = torch.randn(row.tokens, 8, 64, device="cuda", dtype=torch.bfloat16)
        attend_flex(x.requires_grad_(), x, x, flex_mask(row), 0.125).sum().backward()
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counted[0] == counted[1] == counted[2] and compiled_kernel() is compiled_kernel()


def test_a_backward_pass_compiles_as_many_sizes_as_it_meets(monkeypatch: pytest.MonkeyPatch):
    """Claim: where a layer is computed anew in the backward pass, which autograd does in a thread
    of its own, more than 8 sizes are compiled."""
    monkeypatch.setattr(flex_attention, "padded_size", lambda tokens: 128 * (-(-tokens // 128)))
    for size in range(10):
        row = on_the_gpu(two_stream([(128 * size + 1, 0)]).row)
        mask = flex_mask(row)
        x = torch.randn(row.tokens, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = checkpoint(attend_flex, x, x, x, mask, 0.125, use_reentrant=True)
        out.float().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


def needs_transformer_engine() -> None:
    if select_hardware().transformer_engine is None:
        pytest.skip("Transformer Engine is not installed")


def built(models: TinyModels, kernels: Kernels) -> LanguageModel:
    """A tiny student in bfloat16."""
    hardware = jobs.join(Layout())
    hf_dir = models.hf("student", tied=False)
    shape = read_shape(huggingface_dir(hf_dir))
    model = build_model(shape, Layout(), torch.bfloat16, hardware, kernels=kernels)
    load_hf(model, hf_dir)
    return model


def hidden_and_gradients(model: LanguageModel, student: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Final hidden states of the tokens of the sequences, and gradients of a weighted sum."""
    packed = two_stream(LENGTHS)
    row = on_the_gpu(packed.row)
    plan = causal_plan(row.lengths, row.tokens, row.device)
    if student:
        plan.row = row
    tokens = torch.arange(row.tokens, device="cuda") * 7 % 60
    hidden = model.run(tokens, torch.arange(row.tokens, device="cuda") % 40, plan).float()
    weight = torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)
    (hidden * weight).sum().backward()
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients


KERNELS = [("te", "dense"), ("te", "flex"), ("te", "te"), ("local", "flex"), ("local", "te")]


@pytest.mark.parametrize("student", [True, False], ids=["two-stream", "causal"])
@pytest.mark.parametrize(("spec", "attention"), KERNELS)
def test_models_agree(models: TinyModels, spec: str, attention: str, student: bool):
    """Claim: hidden states and gradients of a whole model in bfloat16 are those of Megatron's own
    layers with dense attention: 3 % of the hidden states, 10 % of the gradients and 30 % of each in
    norm."""
    if "te" in (spec, attention):
        needs_transformer_engine()
    hidden, gradients = hidden_and_gradients(built(models, Kernels()), student)
    kernels = Kernels(spec=spec, attention=attention)
    found, found_gradients = hidden_and_gradients(built(models, kernels), student)
    assert float((found - hidden).norm()) < 0.03 * float(hidden.norm())
    fused = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    gaps, wholes = [], []
    for name, gradient in found_gradients.items():
        plain = name
        for own, other in fused.items():
            plain = plain.replace(own, other)
        expected = gradients[plain]
        gaps.append(float((gradient - expected).norm()))
        wholes.append(float(expected.norm()))
        assert gaps[-1] < 0.3 * wholes[-1], name
    assert sum(gap**2 for gap in gaps) < 0.1**2 * sum(whole**2 for whole in wholes)


def test_checkpoints_of_both_specs(models: TinyModels, tmp_path: Path):
    """Claim: what one spec saves the other loads, bit for bit, both ways."""
    needs_transformer_engine()
    te, local = built(models, Kernels(spec="te")), built(models, Kernels())
    expected = {name: p.clone() for name, p in local.named_parameters()}
    for number, (writer, reader) in enumerate(((te, local), (local, te))):
        save_weights(writer, tmp_path / str(number))
        with torch.no_grad():
            for parameter in reader.parameters():
                parameter.zero_()
        load_weights(reader, tmp_path / str(number))
    assert all(torch.equal(p, expected[name]) for name, p in local.named_parameters())
    found = {name: p for name, p in te.named_parameters() if name in expected}
    assert all(torch.equal(p, expected[name]) for name, p in found.items())
    norm = te.get_parameter("decoder.layers.1.mlp.linear_fc1.layer_norm_weight")
    assert torch.equal(norm, expected["decoder.layers.1.pre_mlp_layernorm.weight"])
