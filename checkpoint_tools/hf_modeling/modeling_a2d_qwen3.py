"""Block-diffusion Qwen3 in the layout of dllm and the paper's tools (loaded with
``trust_remote_code=True``).
"""

from transformers import Qwen3ForCausalLM

# transformers 4 copies the files that this one names, not those that they name in turn
from .block_contract import BlockContract  # noqa: F401
from .block_diffusion import BlockDiffusion
from .blocks import sequence_end  # noqa: F401  # pyright: ignore[reportMissingImports]
from .configuration_a2d_qwen3 import A2DQwen3Config
from .denoising import draw  # noqa: F401  # pyright: ignore[reportMissingImports]
from .fp8_linear import Fp8Linear  # noqa: F401
from .randomness import uniform  # noqa: F401  # pyright: ignore[reportMissingImports]


class A2DQwen3LMHeadModel(BlockDiffusion, Qwen3ForCausalLM):
    """Qwen3's weights and layers, bidirectional, with ``generate`` for block diffusion."""

    config_class = A2DQwen3Config


__all__ = ["A2DQwen3LMHeadModel"]
