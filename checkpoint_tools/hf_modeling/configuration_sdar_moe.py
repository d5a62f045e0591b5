"""Configuration of a block-diffusion Qwen3-MoE in the SDAR layout."""

from transformers import Qwen3MoeConfig

from .block_contract import BlockContract


class SDARMoeConfig(BlockContract, Qwen3MoeConfig):
    """Qwen3-MoE's keys and those of the block contract."""

    model_type = "sdar_moe"


__all__ = ["SDARMoeConfig"]
