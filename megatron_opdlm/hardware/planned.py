"""GPUs that are planned for: a record to ask, on a machine without them, not to run on."""

from dataclasses import replace

import torch

from megatron_opdlm.hardware import gpu
from megatron_opdlm.hardware.select import Hardware, select_hardware


def planned_gpu() -> Hardware:
    """An NVIDIA GPU as the container image has it, with Transformer Engine."""
    return replace(
        select_hardware(),
        device=torch.device("cuda"),
        process_group_backend="nccl",
        dtype=torch.bfloat16,
        large_dtype=torch.bfloat16,
        overlaps_reduction=True,
        decode_attention=("rows",),  # pages, as the kernels that run there
        transformer_engine="planned",
        projection_rows=gpu.PROJECTION_ROWS,
        row_tokens=gpu.ROW_TOKENS,
        differentiates_flex=True,
        captures=lambda: gpu.Graphs().capture,
        reason="planned for: NCCL, bfloat16, Transformer Engine",
    )
