"""Block-diffusion Qwen3-MoE in the SDAR layout (``trust_remote_code=True``); needs torch and
transformers only.
"""

from transformers import Qwen3MoeForCausalLM

# transformers 4 copies the files that this one names, not those that they name in turn
from .block_contract import BlockContract  # noqa: F401
from .block_diffusion import BlockDiffusion
from .blocks import sequence_end  # noqa: F401  # pyright: ignore[reportMissingImports]
from .configuration_sdar_moe import SDARMoeConfig
from .denoising import draw  # noqa: F401  # pyright: ignore[reportMissingImports]
from .fp8_linear import Fp8Linear  # noqa: F401
from .randomness import uniform  # noqa: F401  # pyright: ignore[reportMissingImports]

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
