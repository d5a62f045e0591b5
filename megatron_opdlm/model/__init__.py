"""Qwen3 as a Megatron-Core GPTModel with our attention in its core-attention slot."""
