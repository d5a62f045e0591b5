"""A family's model as a Megatron-Core GPTModel with our attention in its core-attention slot."""

import megatron_opdlm.hardware  # noqa: F401 -- before megatron-core
