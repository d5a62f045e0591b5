"""Megatron-OPDLM: autoregressive -> block-diffusion language model by on-policy distillation."""

__version__ = "0.1.0"
