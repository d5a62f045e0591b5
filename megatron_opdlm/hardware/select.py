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

# From here on products are long enough that 16 bits pay for the conversions around them.
LARGE_PARAMETERS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine as the rest of the project sees it."""

    device: torch.device
    devices: tuple[str, ...]  # names of this node's accelerators
    process_group_backend: str  # "gloo" | "nccl"
    dtype: torch.dtype  # of a small model, and of model.dtype=auto in general
    large_dtype: torch.dtype  # of a model of LARGE_PARAMETERS and more
    transformer_options: dict[str, Any]  # fields of Megatron's TransformerConfig
    peak_memory: PeakMemory  # of this rank
    free_memory_bytes: Callable[[], int]  # that this rank may still take
    # Type of a row's dense attention, from the model's.
    attention_dtype: Callable[[torch.dtype], torch.dtype]
    decode_attention: tuple[str, ...]  # what rollout.attention=auto tries, in this order
    transformer_engine: str | None  # its version; None: not here
    draw_numbers: int | None  # logits that a draw works on at once; None: all of a pass
    projection_rows: int  # of loss.chunk_rows=0: positions projected to the vocabulary at once
    row_tokens: int  # of update.tokens_per_microbatch=0: length of packed rows
    differentiates_flex: bool  # FlexAttention has a backward pass
    overlaps_reduction: bool  # gradients are summed over replicas while others are computed
    # Makes something that runs a function, captures it and returns one that repeats its kernels;
    # what one of them captured shares memory. None: cannot.
    captures: Callable[[], Capture] | None
    # A weight [N, K] -> x -> x @ weight^T, faster where many such products follow; None: no faster.
    laid_out: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor] | None]
    upload: Callable[[torch.Tensor], torch.Tensor]  # host to device, without waiting
    # Starts a copy to the host; the function that comes back waits for it.
    fetch: Callable[[torch.Tensor], Callable[[], torch.Tensor]]
    reason: str  # why this hardware was chosen, for the log

    def dtype_of(self, parameters: int) -> torch.dtype:
        """model.dtype=auto of a model of this size."""
        return self.large_dtype if parameters >= LARGE_PARAMETERS else self.dtype


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
        engine = gpu.transformer_engine()
        return Hardware(
            device=device,
            devices=gpu.device_names(),
            process_group_backend="nccl",
            dtype=torch.bfloat16,
            large_dtype=torch.bfloat16,
            transformer_options=gpu.transformer_options(engine),
            peak_memory=gpu.peak_memory(),
            free_memory_bytes=gpu.free_memory_bytes,
            attention_dtype=lambda dtype: dtype,
            decode_attention=gpu.DECODE_ATTENTION,
            transformer_engine=engine,
            draw_numbers=None,
            projection_rows=gpu.PROJECTION_ROWS,
            row_tokens=gpu.ROW_TOKENS,
            differentiates_flex=True,
            overlaps_reduction=True,
            captures=lambda: gpu.Graphs().capture,
            laid_out=lambda weight: None,
            upload=gpu.upload,
            fetch=gpu.fetch,
            reason="CUDA is available: NCCL, bfloat16",
        )
    megatron_on_cpu.install()
    torch.set_num_threads(1)
    unit = cpu.bfloat16_unit()
    return Hardware(
        device=torch.device("cpu"),
        devices=(),
        process_group_backend="gloo",
        dtype=torch.float32,
        large_dtype=torch.bfloat16 if unit else torch.float32,
        transformer_options=cpu.TRANSFORMER_OPTIONS,
        peak_memory=peak_memory.resident(),
        free_memory_bytes=_available_bytes,
        attention_dtype=cpu.attention_dtype,
        decode_attention=("buckets",),
        transformer_engine=None,
        draw_numbers=cpu.DRAW_NUMBERS,
        projection_rows=cpu.PROJECTION_ROWS,
        row_tokens=cpu.ROW_TOKENS,
        differentiates_flex=False,
        overlaps_reduction=False,
        captures=None,
        laid_out=cpu.laid_out,
        upload=lambda x: x,
        fetch=cpu.fetch,
        reason=_cpu_reason(unit),
    )


def _cpu_reason(unit: str) -> str:
    if not unit:
        return "no CUDA device: gloo, float32, one thread a rank"
    millions = LARGE_PARAMETERS // 10**6
    return (
        f"no CUDA device: gloo, one thread a rank, float32; bfloat16 for models of {millions} "
        f"million parameters and more, since this processor multiplies in it ({unit})"
    )
