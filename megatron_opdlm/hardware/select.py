"""Chooses the hardware once, into one record. Nobody else asks what machine this is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from megatron_opdlm import launcher
from megatron_opdlm.hardware import cpu, gpu, group_adam, megatron_on_cpu, peak_memory
from megatron_opdlm.hardware.peak_memory import PeakMemory

Run = Callable[[], torch.Tensor]
Capture = Callable[[Run], Run]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine as the rest of the project sees it."""

    device: torch.device
    devices: tuple[str, ...]  # names of this node's accelerators
    process_group_backend: str  # "gloo" | "nccl"
    dtype: torch.dtype  # default of model.dtype=auto
    transformer_options: dict[str, Any]  # fields of Megatron's TransformerConfig
    peak_memory: PeakMemory  # of this rank
    free_memory_bytes: Callable[[], int]  # that this rank may still take
    decode_attention: tuple[str, ...]  # what rollout.attention=auto tries, in this order
    transformer_engine: str | None  # its version; None: not here
    projection_rows: int  # of loss.chunk_rows=0: positions projected to the vocabulary at once
    differentiates_flex: bool  # FlexAttention has a backward pass
    # Makes something that runs a function, captures it and returns one that repeats its kernels;
    # what one of them captured shares memory. None: cannot.
    captures: Callable[[], Capture] | None
    upload: Callable[[torch.Tensor], torch.Tensor]  # host to device, without waiting
    # Starts a copy to the host; the function that comes back waits for it.
    fetch: Callable[[torch.Tensor], Callable[[], torch.Tensor]]
    reason: str  # why this hardware was chosen, for the log


def _available_bytes() -> int:
    """This rank's share of the memory that the machine could still give."""
    return psutil.virtual_memory().available // launcher.local_world_size()


@functools.cache
def select_hardware() -> Hardware:
    """GPUs if CUDA is available, else the CPU with one thread a rank (more threads make small
    models slower). From here on float32 means float32.
    """
    # And not TF32, which NGC's images ask for (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1).
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        device = gpu.set_device(launcher.local_rank())
        group_adam.use_where_megatron_falls_back()
        return Hardware(
            device=device,
            devices=gpu.device_names(),
            process_group_backend="nccl",
            dtype=torch.bfloat16,
            transformer_options=gpu.TRANSFORMER_OPTIONS,
            peak_memory=gpu.peak_memory(),
            free_memory_bytes=gpu.free_memory_bytes,
            decode_attention=gpu.DECODE_ATTENTION,
            transformer_engine=gpu.transformer_engine(),
            projection_rows=gpu.PROJECTION_ROWS,
            differentiates_flex=True,
            captures=lambda: gpu.Graphs().capture,
            upload=gpu.upload,
            fetch=gpu.fetch,
            reason="CUDA is available: NCCL, bfloat16",
        )
    megatron_on_cpu.install()
    torch.set_num_threads(1)
    return Hardware(
        device=torch.device("cpu"),
        devices=(),
        process_group_backend="gloo",
        dtype=torch.float32,
        transformer_options=cpu.TRANSFORMER_OPTIONS,
        peak_memory=peak_memory.resident(),
        free_memory_bytes=_available_bytes,
        decode_attention=("buckets",),
        transformer_engine=None,
        projection_rows=cpu.PROJECTION_ROWS,
        differentiates_flex=False,
        captures=None,
        upload=lambda x: x,
        fetch=cpu.fetch,
        reason="no CUDA device: gloo, float32, one thread a rank",
    )
