"""What running on CPU means for Megatron: gloo, float32 by default, no fused kernels."""

from typing import Any

TRANSFORMER_OPTIONS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "batch_p2p_comm": False,
    "deallocate_pipeline_outputs": False,
}
