"""Configuration of a block-diffusion Qwen3 in the layout of dllm and the paper's tools."""

from transformers import Qwen3Config

from .block_contract import BlockContract


class A2DQwen3Config(BlockContract, Qwen3Config):
    """Qwen3's keys and those of the block contract."""

    model_type = "a2d-qwen3"


__all__ = ["A2DQwen3Config"]
