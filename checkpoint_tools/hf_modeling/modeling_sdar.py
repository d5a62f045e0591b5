"""Block-diffusion Qwen3 in the SDAR layout (``trust_remote_code=True``); needs torch and
transformers only.
"""

from transformers import Qwen3ForCausalLM

from .block_diffusion import BlockDiffusion
from .configuration_sdar import SDARConfig


class SDARForCausalLM(BlockDiffusion, Qwen3ForCausalLM):
    """Qwen3's weights and layers, bidirectional, with ``generate`` for block diffusion."""

    config_class = SDARConfig


__all__ = ["SDARForCausalLM"]
