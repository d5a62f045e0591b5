"""Builds a model of any family as a Megatron-Core ``GPTModel``: the one model of student, teacher,
rollout and evaluation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_opdlm.configuration.models import Recompute
from megatron_opdlm.hardware import Hardware, Product
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.experts import expert_options
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model.layer_spec import block_spec
from megatron_opdlm.model.rotary import ExplicitRope, MegatronRope, score_scale
from megatron_opdlm.model.vocab_parallel import VocabularyShard
from megatron_opdlm.model_files.shape import ModelShape, check_layout, padded_vocab
from megatron_opdlm.parallel import Layout


class LanguageModel(GPTModel):
    """A GPTModel whose last pipeline stage returns final hidden states: logits are taken only where
    they are needed.
    """

    shape: ModelShape
    head_product: Product | None = None  # hidden states -> logits, where the weight is laid out
    rope: ExplicitRope

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Tensor:
        """Megatron's, which leaves it to our attention to turn queries and keys unless a fused
        kernel does: cosines and sines are the same in every layer.
        """
        if not self.config.apply_rope_fusion:
            plan: AttentionPlan = kwargs["packed_seq_params"]
            plan.rotation = self.rope.rotation(position_ids[0])
        return super().forward(input_ids, position_ids, attention_mask, **kwargs)

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


_RECOMPUTATION: dict[Recompute, dict[str, Any]] = {
    "false": {},
    "true": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
}


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    hardware: Hardware,
    *,
    recompute: Recompute,
) -> TransformerConfig:
    """Megatron's description of a model of this shape on this hardware."""
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
        add_qkv_bias=shape.family.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        qk_layernorm=shape.family.qk_norm,
        softmax_scale=score_scale(shape.head_dim, shape.rope_scaling),
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
        **_RECOMPUTATION[recompute],
        **hardware.transformer_options,
    )


def build_model(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    hardware: Hardware,
    *,
    name: str = "model",
    recompute: Recompute = "false",
    kernels: Kernels = Kernels(),  # noqa: B008 -- frozen
) -> LanguageModel:
    """This rank's part of a model, its weights not yet filled. ``name`` stands in error messages.

    Raises InputError where the layout does not divide the shape.
    """
    check_layout(shape, layout.tensor, layout.pipeline, name, layout.context, layout.expert)
    config = transformer_config(shape, layout, dtype, hardware, recompute=recompute)
    model = LanguageModel(
        config=config,
        transformer_layer_spec=block_spec(config, kernels, shape),
        vocab_size=padded_vocab(shape.vocab_size, layout.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="mrope" if config.apply_rope_fusion else "none",
        parallel_output=True,
    )
    model.rope = ExplicitRope(dim=shape.head_dim, base=shape.rope_theta, scaling=shape.rope_scaling)
    if config.apply_rope_fusion:
        model.add_module("rotary_pos_emb", MegatronRope(model.rope))
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


def _mark_tensor_parallel(model: LanguageModel) -> None:
    """Tell Megatron which parameters are split over tensor ranks; the others count once in the
    gradient norm.

    Megatron does this while it initialises weights, which we skip.
    """
    for name, parameter in model.named_parameters():
        module, attribute = name.split(".")[-2:]
        # A linear of Transformer Engine also holds the norm before it, whole on every rank; one of
        # its experts is ``weight3``. Of biases there are only those of queries, keys and values.
        own = attribute.rstrip("0123456789") in ("weight", "bias")
        split = _SPLIT_DIMENSION.get(module) if own else None
        if split is not None and not hasattr(parameter, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, split, 1)


_SEQUENCE_PARALLEL_SWITCHES = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)


@contextmanager
def without_sequence_parallel(model: LanguageModel) -> Iterator[None]:
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
