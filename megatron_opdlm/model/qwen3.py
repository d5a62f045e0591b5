"""Builds Qwen3 as a Megatron-Core ``GPTModel``: the one model of student, teacher, rollout and
evaluation.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from checkpoint_tools import qwen3_names
from checkpoint_tools.files.safetensors_dir import open_weights
from checkpoint_tools.qwen3_shape import Qwen3Shape, check_layout, padded_vocab
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.model import lora
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.experts import expert_options
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model.layer_spec import block_spec
from megatron_opdlm.model.vocab_parallel import VocabularyShard
from megatron_opdlm.parallel import Layout


class ExplicitRope(torch.nn.Module):
    """Rotary angles for explicit positions (the two streams share them): position_ids [b, s] -> [s,
    b, 1, d].

    Angles are products of elements in float32, never a matmul: TF32 would round the frequencies.
    """

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(
        self, position_ids: Tensor, mrope_section: list[int] | None = None, cp_group: Any = None
    ) -> Tensor:
        steps = torch.arange(0, self.dim, 2, dtype=torch.float32, device=position_ids.device)
        frequency = 1.0 / (self.base ** (steps / self.dim))
        angle = position_ids.t().float().unsqueeze(-1) * frequency
        return torch.cat((angle, angle), dim=-1).unsqueeze(2)


class Qwen3(GPTModel):
    """A GPTModel whose last pipeline stage returns final hidden states: logits are taken only where
    they are needed.
    """

    shape: Qwen3Shape

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        plan = kwargs["packed_seq_params"]
        if self.post_process and plan.reads_nothing and not self.config.sequence_parallel:
            return hidden_states[:0]
        return hidden_states

    def run(self, tokens_N: Tensor, position_N: Tensor, plan: AttentionPlan) -> Tensor:
        """One packed row through this stage's layers -> hidden states [N or N / TP, 1, H]; from the
        last stage [M, 1, H] where the plan reads M rows and there is no sequence parallelism.
        """
        return self(tokens_N[None], position_N[None], None, packed_seq_params=plan)

    @property
    def head_weight(self) -> Tensor:
        """Output projection [columns, H] of this tensor rank; exists on the last pipeline stage."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert weight is not None
        return weight

    @property
    def shard(self) -> VocabularyShard:
        """This rank's share of the vocabulary."""
        return VocabularyShard(
            self.vocab_size // parallel_state.get_tensor_model_parallel_world_size(),
            self.shape.vocab_size,
        )

    @property
    def layer_numbers(self) -> range:
        """Megatron's global, 1-based numbers of this stage's layers."""
        first = get_transformer_layer_offset(self.config) + 1
        return range(first, first + len(self.decoder.layers))


def transformer_config(
    shape: Qwen3Shape, layout: Layout, dtype: torch.dtype, hardware: Hardware, *, recompute: bool
) -> TransformerConfig:
    """Megatron's description of a Qwen3 of this shape on this hardware."""
    recomputation = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        # Megatron copies the configuration for experts of another width, and the copy would miss
        # what we switch while decoding.
        ffn_hidden_size=shape.experts.ffn if shape.experts else shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        qk_layernorm=True,
        layernorm_epsilon=shape.rms_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=[shape.head_dim // 2, 0, 0],
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable lengths need it, even without experts
        calculate_per_token_loss=True,  # gradients are divided by the sequences summed over DP
        perform_initialization=False,  # weights are always loaded, and loading is complete
        **expert_options(shape.experts),
        **(recomputation if recompute else {}),
        **hardware.transformer_options,
    )


def build_model(
    shape: Qwen3Shape,
    layout: Layout,
    dtype: torch.dtype,
    hardware: Hardware,
    *,
    name: str = "model",
    recompute: bool = False,
    kernels: Kernels = Kernels(),  # noqa: B008 -- frozen
) -> Qwen3:
    """This rank's part of a Qwen3, its weights not yet filled. ``name`` stands in error messages.

    Raises InputError where the layout does not divide the shape.
    """
    check_layout(shape, layout.tensor, layout.pipeline, name, layout.context, layout.expert)
    config = transformer_config(shape, layout, dtype, hardware, recompute=recompute)
    model = Qwen3(
        config=config,
        transformer_layer_spec=block_spec(config, kernels, shape.experts),
        vocab_size=padded_vocab(shape.vocab_size, layout.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="mrope",
        parallel_output=True,
    )
    model.add_module("rotary_pos_emb", ExplicitRope(shape.head_dim, shape.rope_theta))
    model.shape = shape
    _mark_tensor_parallel(model)
    return model.to(hardware.device)


_SPLIT_DIMENSION = {
    "word_embeddings": 0,
    "linear_qkv": 0,
    "linear_proj": 1,
    "linear_fc1": 0,
    "linear_fc2": 1,
    "output_layer": 0,
}


def _mark_tensor_parallel(model: Qwen3) -> None:
    """Tell Megatron which parameters are split over tensor ranks; the others count once in the
    gradient norm.

    Megatron does this while it initialises weights, which we skip.
    """
    for name, parameter in model.named_parameters():
        module, attribute = name.split(".")[-2:]
        # A linear of Transformer Engine also holds the norm before it, whole on every rank; one of
        # its experts is ``weight3``.
        own = attribute.rstrip("0123456789") == "weight"
        split = _SPLIT_DIMENSION.get(module) if own else None
        if split is not None and not hasattr(parameter, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, split, 1)


def named_global_parameters(model: Qwen3) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model, parameter) of this rank's part; low-rank terms are no part of a
    Qwen3.
    """
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{lora.NAME}."):
            yield global_name(model, name), parameter


def global_name(model: Qwen3, name: str) -> str:
    """Name of a parameter in this rank's model -> its name in the whole model.

    Of Transformer Engine's experts, parameter ``linear_fc1.weight3`` is that of local expert 3.
    """
    prefix, _, rest = name.partition("decoder.layers.")
    if prefix or not rest:
        return name
    number, _, attribute = rest.partition(".")
    if (found := _EXPERT.fullmatch(attribute)) is not None:
        linear, last = found["linear"], found["grouped"]
        local = int(found["one"] if last is None else last)
        attribute = f"mlp.experts.{local + _first_expert(model)}.{linear}.weight"
    full = f"decoder.layers.{int(number) + get_transformer_layer_offset(model.config)}.{attribute}"
    layer, attribute = qwen3_names.split_layer(full)
    return f"decoder.layers.{layer}.{attribute}"


_EXPERT = re.compile(
    r"mlp\.experts\.(local_experts\.(?P<one>\d+)\.)?(?P<linear>\w+)\.weight(?P<grouped>\d+)?"
)


def _first_expert(model: Qwen3) -> int:
    """Number in the whole model of this rank's first expert."""
    experts = model.shape.experts
    assert experts is not None
    local = experts.count // parallel_state.get_expert_model_parallel_world_size()
    return local * parallel_state.get_expert_model_parallel_rank()


@torch.no_grad()
def fill(model: Qwen3, get: Callable[[str], Tensor]) -> None:
    """Fill every parameter of this rank from whole Hugging Face tensors returned by ``get``."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in named_global_parameters(model):
        part = qwen3_names.megatron_from_hf(
            name, model.shape, get, tensor_rank, tensor_ranks, model.vocab_size
        )
        assert part.shape == parameter.shape, (name, tuple(part.shape), tuple(parameter.shape))
        parameter.copy_(part)


def load_hf(model: Qwen3, hf_dir: Path) -> None:
    """Fill the model from a Hugging Face directory; each rank reads the tensors that it holds a
    part of.
    """
    with open_weights(hf_dir) as weights:
        fill(model, weights.get)


_SEQUENCE_PARALLEL_SWITCHES = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)


@contextmanager
def without_sequence_parallel(model: Qwen3) -> Iterator[None]:
    """Switch sequence parallelism off while decoding: a window can have fewer tokens than there are
    tensor ranks.
    """
    if not model.config.sequence_parallel:
        yield
        return
    switched = [
        (holder, name)
        for holder in (model.config, *model.modules())
        for name in _SEQUENCE_PARALLEL_SWITCHES
        if holder.__dict__.get(name) is True
    ]
    for holder, name in switched:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in switched:
            setattr(holder, name, True)
