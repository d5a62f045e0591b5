"""Hugging Face directories <-> Megatron checkpoints: import, export, verify, inspect."""
