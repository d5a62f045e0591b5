"""Block-diffusion models in the layouts of dllm and the paper's tools (loaded with
``trust_remote_code=True``): the family's weights and layers, bidirectional, with ``generate`` for
block diffusion.
"""

from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

# transformers 4 copies the files that this one names, not those that they name in turn
from .block_contract import BlockContract  # noqa: F401
from .block_diffusion import BlockDiffusion
from .blocks import sequence_end  # noqa: F401  # pyright: ignore[reportMissingImports]
from .configuration_a2d import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config
from .denoising import draw  # noqa: F401  # pyright: ignore[reportMissingImports]
from .fp8_linear import Fp8Linear  # noqa: F401
from .randomness import uniform  # noqa: F401  # pyright: ignore[reportMissingImports]


class A2DQwen3LMHeadModel(BlockDiffusion, Qwen3ForCausalLM):
    """A Qwen3."""

    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(BlockDiffusion, Qwen2ForCausalLM):
    """A Qwen2 or Qwen2.5."""

    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(BlockDiffusion, LlamaForCausalLM):
    """A Llama, or another model of that architecture."""

    config_class = A2DLlamaConfig


__all__ = ["A2DLlamaLMHeadModel", "A2DQwen2LMHeadModel", "A2DQwen3LMHeadModel"]
