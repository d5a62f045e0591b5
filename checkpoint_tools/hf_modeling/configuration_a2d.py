"""Configurations of block-diffusion models in the layouts of dllm and the paper's tools: the keys
of the family and those of the block contract.
"""

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from .block_contract import BlockContract


class A2DQwen3Config(BlockContract, Qwen3Config):
    """Of a Qwen3."""

    model_type = "a2d-qwen3"


class A2DQwen2Config(BlockContract, Qwen2Config):
    """Of a Qwen2 or Qwen2.5."""

    model_type = "a2d-qwen2"


class A2DLlamaConfig(BlockContract, LlamaConfig):
    """Of a Llama, or another model of that architecture."""

    model_type = "a2d-llama"


__all__ = ["A2DLlamaConfig", "A2DQwen2Config", "A2DQwen3Config"]
