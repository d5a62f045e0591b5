"""What a layer is made of: Megatron's own modules ("local"), or Transformer Engine's with norms
fused into the linears ("te"). Both have our layer class and our attention in its slot, and store
their weights under the same names.
"""

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron_opdlm.hardware.elementwise import rms_norm
from megatron_opdlm.model.attention import MaskedAttention
from megatron_opdlm.model.experts import experts_spec
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model.layer import ReadingLayer
from megatron_opdlm.model_files.shape import Experts, ModelShape


class RMSNorm(torch.nn.Module):
    """``rms_norm``, usable under sequence parallelism; rounded once, as in Transformer Engine."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradient over tensor ranks where this mark is set.
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return rms_norm(x, self.weight, self.eps)


def block_spec(config: TransformerConfig, kernels: Kernels, shape: ModelShape) -> Any:
    """Specification of this stage's layers and of the final norm."""
    make = _te_layer if kernels.spec == "te" else _local_layer
    spec, norm = make(qk_norm=shape.family.qk_norm, experts=shape.experts)
    spec.module = ReadingLayer
    if shape.experts is not None:
        spec.submodules.mlp = experts_spec(shape.experts, grouped=kernels.spec == "te")
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(
        module=MaskedAttention, params={"backend": kernels.attention}
    )
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm
    )


def _local_layer(*, qk_norm: bool, experts: Experts | None) -> tuple[Any, Any]:
    """(layer, norm)"""
    spec: Any = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=qk_norm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec, RMSNorm


def _te_layer(*, qk_norm: bool, experts: Experts | None) -> tuple[Any, Any]:
    """(layer, norm) of Transformer Engine. Its norms take epsilon and the kind of norm from the
    configuration and compute in float32; their weights are not centred at zero.

    The norm before experts, whose router reads it, is a module of its own; it is stored as the
    fused one is, so that a checkpoint has the same names whatever wrote it.
    """
    specs: Any = gpt_layer_specs
    spec = specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    norm = specs.TESpecProvider().layer_norm()
    if experts is not None:
        layer = spec.submodules
        layer.pre_mlp_layernorm = norm
        layer.sharded_state_dict_keys_map = {
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
    return spec, norm
