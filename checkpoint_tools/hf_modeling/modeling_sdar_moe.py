"""Block-diffusion Qwen3-MoE in the SDAR layout (``trust_remote_code=True``); needs torch and
transformers only.
"""

from transformers import Qwen3MoeForCausalLM

from .block_diffusion import BlockDiffusion
from .configuration_sdar_moe import SDARMoeConfig


class SDARMoeForCausalLM(BlockDiffusion, Qwen3MoeForCausalLM):
    """Qwen3-MoE's weights and layers, bidirectional, with ``generate`` for block diffusion."""

    config_class = SDARMoeConfig


__all__ = ["SDARMoeForCausalLM"]
