"""What NVIDIA GPUs mean for Megatron: NCCL, bfloat16 by default. Not run on a GPU yet."""

from typing import Any

import torch

TRANSFORMER_OPTIONS: dict[str, Any] = {
    "use_cpu_initialization": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "batch_p2p_comm": False,
    "deallocate_pipeline_outputs": False,
}


def peak_memory_bytes() -> int:
    """Largest amount of GPU memory that tensors have occupied on this rank."""
    return torch.cuda.max_memory_allocated()


def free_memory_bytes() -> int:
    """GPU memory that is not taken, what torch's allocator holds unused included."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def set_device(local_rank: int) -> torch.device:
    """Bind this process to its GPU."""
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
