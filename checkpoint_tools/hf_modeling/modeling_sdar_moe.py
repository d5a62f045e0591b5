"""Block-diffusion Qwen3-MoE in the SDAR layout (``trust_remote_code=True``); needs torch and
transformers only.
"""

from transformers import Qwen3MoeForCausalLM

from .block_diffusion import BlockDiffusion
from .configuration_sdar_moe import SDARMoeConfig

try:  # transformers 5 joins a layer's experts while it reads them, by model type
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:  # transformers 4 keeps them apart, as the files do
    pass
else:
    register_checkpoint_conversion_mapping(
        SDARMoeConfig.model_type,
        get_checkpoint_conversion_mapping("qwen3_moe"),
        overwrite=True,  # the file is imported once for each directory
    )


class SDARMoeForCausalLM(BlockDiffusion, Qwen3MoeForCausalLM):
    """Qwen3-MoE's weights and layers, bidirectional, with ``generate`` for block diffusion."""

    config_class = SDARMoeConfig


__all__ = ["SDARMoeForCausalLM"]
