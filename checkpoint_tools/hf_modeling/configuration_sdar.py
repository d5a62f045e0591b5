"""Configuration of a block-diffusion Qwen3 in the SDAR layout."""

from transformers import Qwen3Config

from .block_contract import BlockContract


class SDARConfig(BlockContract, Qwen3Config):
    """Qwen3's keys and those of the block contract."""

    model_type = "sdar"


__all__ = ["SDARConfig"]
