"""Megatron-OPDLM: autoregressive Qwen3 -> block-diffusion language model by on-policy distillation."""

__version__ = "0.1.0"
