"""Block-diffusion Qwen3 in the layout of dllm and the paper's tools (loaded with
``trust_remote_code=True``).
"""

from transformers import Qwen3ForCausalLM

from .block_diffusion import BlockDiffusion
from .configuration_a2d_qwen3 import A2DQwen3Config


class A2DQwen3LMHeadModel(BlockDiffusion, Qwen3ForCausalLM):
    """Qwen3's weights and layers, bidirectional, with ``generate`` for block diffusion."""

    config_class = A2DQwen3Config


__all__ = ["A2DQwen3LMHeadModel"]
