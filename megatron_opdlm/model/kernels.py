"""Which layers and which attention a model is built with, and why."""

from dataclasses import dataclass

import torch

from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Names of what computes a model. The defaults run everywhere."""

    spec: str = "local"  # "local" | "te": whose layers
    attention: str = "dense"  # "dense" | "flex" | "te": who attends in a packed row

    @property
    def skips_hidden(self) -> bool:
        """Whether pairs that nobody sees cost (nearly) nothing, so that a row may hold trees."""
        return self.attention != "te"

    def __str__(self) -> str:
        return f"{self.spec} layers with {self.attention} attention"


def choose_kernels(
    spec: str, attention: str, dtype: torch.dtype, hardware: Hardware, *, causal: bool
) -> Kernels:
    """``model.spec`` and ``attention.backend`` for one model of this type on this hardware.
    ``causal``: it is the teacher, never differentiated.

    Raises InputError where a named one cannot run here.
    """
    _check(spec, attention, dtype, hardware)
    has_te = hardware.transformer_engine is not None and dtype is not torch.float32
    if spec == "auto":
        spec = "te" if has_te else "local"
    if attention == "auto" and not hardware.differentiates_flex:
        attention = "dense"
    elif attention == "auto":
        attention = "te" if causal and has_te else "flex"
    return Kernels(spec=spec, attention=attention)


def _check(spec: str, attention: str, dtype: torch.dtype, hardware: Hardware) -> None:
    if attention == "flex" and not hardware.differentiates_flex:
        raise InputError(
            "attention.backend=flex cannot train here, since FlexAttention has no backward pass "
            f"on a {hardware.device.type}; use attention.backend=dense or auto"
        )
    for key, value, other in (
        ("attention.backend", attention, "flex"),
        ("model.spec", spec, "local"),
    ):
        if value == "te" and hardware.transformer_engine is None:
            raise InputError(
                f"{key}=te needs Transformer Engine on a GPU, which this machine lacks "
                f"({hardware.reason}); use {key}=auto"
            )
        if value == "te" and dtype is torch.float32:
            raise InputError(
                f"{key}=te computes in 16 bits (it rounds float32 to TF32), but the model is fp32; "
                f"use model.dtype=bf16 and teacher.dtype=bf16, or {key}={other}"
            )


def reason(hardware: Hardware) -> str:
    """Why ``auto`` chooses what it chooses."""
    if not hardware.differentiates_flex:
        return f"FlexAttention has no backward pass on a {hardware.device.type}"
    if hardware.transformer_engine is None:
        return "FlexAttention skips hidden tiles; Transformer Engine is not installed"
    return (
        "FlexAttention skips hidden tiles of the student's mask; Transformer Engine "
        f"{hardware.transformer_engine} has fused layers and causal attention in 16 bits"
    )
