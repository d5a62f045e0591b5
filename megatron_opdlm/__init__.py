"""Megatron-OPDLM: autoregressive Qwen3 -> block-diffusion model by on-policy distillation."""

__version__ = "0.1.0"
