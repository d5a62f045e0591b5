"""Options of Megatron's distributed AdamW, and what they need of the machine."""

from importlib.util import find_spec

import torch

import megatron_opdlm.hardware  # noqa: F401 -- before megatron-core

# isort: split
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers

from megatron_opdlm.config import Config
from megatron_opdlm.config import OptimizerConfig as Options
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.offload import check_optimizer_offload

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# An attribute of its linears, read in every forward (transformer_engine/pytorch/module/linear.py).
_OF_TRANSFORMER_ENGINE = "fuse_wgrad_accumulation"
_NARROW_KEYS = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def optimizer_config(config: Config, dtype: torch.dtype, hardware: Hardware) -> OptimizerConfig:
    """Megatron's description of the optimizer of a model of this type. States in 16 bits are
    Transformer Engine's: not run on a GPU yet.

    Raises InputError where the machine cannot do what is asked.
    """
    o = config.optimizer
    narrow = narrow_states(o)
    _check(narrow, dtype, hardware)
    if o.cpu_offload:
        check_optimizer_offload(dtype, hardware)
    return OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=bool(narrow),
        main_params_dtype=_DTYPES[o.main_params_dtype],
        exp_avg_dtype=_DTYPES[o.exp_avg_dtype],
        exp_avg_sq_dtype=_DTYPES[o.exp_avg_sq_dtype],
    )


def narrow_states(options: Options) -> list[str]:
    """``key=value`` of every state that is kept in 16 bits."""
    values = {key: getattr(options, key) for key in _NARROW_KEYS}
    return [f"optimizer.{key}={value}" for key, value in values.items() if value != "fp32"]


def _check(narrow: list[str], dtype: torch.dtype, hardware: Hardware) -> None:
    if not narrow:
        return
    shown = ", ".join(narrow)
    if hardware.device.type == "cpu" or find_spec("transformer_engine") is None:
        raise InputError(
            f"{shown} needs a GPU and Transformer Engine's Adam, which are not here "
            f"({hardware.reason}); use fp32"
        )
    if dtype is not torch.bfloat16:
        raise InputError(
            f"{shown} is for models in 16 bits, but the student's type is fp32; use "
            "model.dtype=bf16, or fp32 states"
        )


def fuse_gradients(model: torch.nn.Module) -> None:
    """Let linears add the gradients of their weights to the float32 sums as they are made:
    Transformer Engine's by themselves, Megatron's own where Apex's kernel is installed. For a model
    in Megatron's wrapper only, which holds the sums. Not run on a GPU yet.
    """
    for module in model.modules():
        if hasattr(module, _OF_TRANSFORMER_ENGINE):
            setattr(module, _OF_TRANSFORMER_ENGINE, True)
        elif layers._grad_accum_fusion_available and isinstance(
            module, layers.ColumnParallelLinear | layers.RowParallelLinear
        ):
            module.gradient_accumulation_fusion = True


def gradient_sums(spec: str) -> str:
    """What adds the gradients of a model's layers ("local" | "te") to their float32 sums."""
    if spec == "te":
        return "added to the float32 sums by Transformer Engine's linears"
    if layers._grad_accum_fusion_available:
        return "added to the float32 sums by Apex's fused kernel"
    return "added to the float32 sums after they are made: Apex's fused kernel is not here"
