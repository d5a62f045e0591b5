"""What running on CPU means for Megatron: gloo, float32 by default, no fused kernels."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Positions projected to the vocabulary at once: two arrays of 64 x 151,936 numbers, 74 MiB. And the
# length of packed rows. Longer ones are faster by a few percent (docs/performance.md).
PROJECTION_ROWS, ROW_TOKENS = 64, 1024
DRAW_NUMBERS = 1 << 18  # logits that a draw works on at once: 1 MiB

TRANSFORMER_OPTIONS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "batch_p2p_comm": False,
    "deallocate_pipeline_outputs": False,
}

_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # Linux' names, the fastest first


def bfloat16_unit(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What of this processor multiplies matrices in bfloat16; empty where nothing does, or where
    the system does not tell.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return next((unit for unit in _BFLOAT16_UNITS if unit in flags), "")


def attention_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which attention is computed for a model's. Without AMX, PyTorch's kernel takes up to
    20 times as long in bfloat16 (backward, short rows) as in float32. With it, nobody has measured.
    """
    if dtype is torch.bfloat16 and not _has_amx():
        return torch.float32
    return dtype


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def _multiplies_in_bfloat16() -> bool:
    return bool(bfloat16_unit())


def laid_out(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """x -> x @ weight^T for many products with a weight [N, K] that does not change, equal to
    torch's bit for bit: oneDNN brings a bfloat16 weight into its own order once, not at every
    product. None where there is nothing to gain.
    """
    if weight.dtype is not torch.bfloat16 or not _multiplies_in_bfloat16():
        return None
    kernels: Any = torch.ops.mkldnn
    if not hasattr(kernels, "_linear_pointwise"):
        return None
    ordered = kernels._reorder_linear_weight(weight.detach())
    return lambda x: kernels._linear_pointwise(x, ordered, None, "none", [], "")


def fetch(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A copy, made at once, since what it was made of may be overwritten before it is read."""
    copy = x.clone()
    return lambda: copy
