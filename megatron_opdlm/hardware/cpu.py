"""What running on CPU means for Megatron: gloo, float32 by default, no fused kernels."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_opdlm import launcher

# Positions projected to the vocabulary at once: two arrays of 64 x 151,936 numbers, 74 MiB. And the
# length of packed rows. Longer ones are faster by a few percent (docs/performance.md).
PROJECTION_ROWS, ROW_TOKENS = 64, 1024
DRAW_NUMBERS = 1 << 18  # logits that a draw works on at once: 1 MiB

LAID_OUT = 1 / 8  # of the memory may be taken by weights that are laid out beside the model's own
LEAST_LAID_OUT = 1 << 17  # numbers of a weight; with fewer, calling oneDNN costs more than it gains

Product = Callable[[torch.Tensor], torch.Tensor]

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


def laid_out(weights: Sequence[torch.Tensor]) -> list[Product | None]:
    """x -> x @ weight^T of each weight [N, K], for many products while they do not change: oneDNN
    brings them into its own order once, not at every product. In bfloat16 the products are torch's
    bit for bit; in float32, where oneDNN rounds otherwise than torch, weights stay as they are.

    None for a weight that gains nothing; all None where together they are more than ``LAID_OUT`` of
    the machine's memory.
    """
    kernels: Any = torch.ops.mkldnn
    gains = [_gains(weight) and hasattr(kernels, "_linear_pointwise") for weight in weights]
    whole = sum(weight.nbytes for weight, gain in zip(weights, gains, strict=True) if gain)
    if whole > laid_out_limit():
        gains = [False] * len(weights)

    def product(weight: torch.Tensor) -> Product:
        ordered = kernels._reorder_linear_weight(weight.detach())
        return lambda x: kernels._linear_pointwise(x, ordered, None, "none", [], "")

    return [product(w) if gain else None for w, gain in zip(weights, gains, strict=True)]


def laid_out_limit() -> float:
    """Bytes that a rank's weights may take once more."""
    return LAID_OUT * psutil.virtual_memory().total / launcher.local_world_size()


def lays_out(dtype: torch.dtype) -> bool:
    """Whether products of large weights of this type gain."""
    return dtype is torch.bfloat16 and _multiplies_in_bfloat16()


def _gains(weight: torch.Tensor) -> bool:
    return lays_out(weight.dtype) and weight.numel() >= LEAST_LAID_OUT


def fetch(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A copy, made at once, since what it was made of may be overwritten before it is read."""
    copy = x.clone()
    return lambda: copy
