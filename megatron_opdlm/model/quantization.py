"""FP8 linears through NVIDIA ModelOpt: E4M3, one scale a tensor, weights and activations. The
frozen teacher computes with them (docs/teacher.md); exports get their scales here
(docs/serving.md).

A tensor x with the scale s = amax / 448 becomes s * fp8(x / s), where fp8 rounds to the nearest
E4M3 number and 448 is the largest of them. A weight's amax is its largest absolute value, an
activation's the largest that the linear saw on the calibration sequences. ModelOpt takes both over
tensor, data and context ranks, so every layout rounds with the same scales.
"""

import contextlib
import copy
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model.gpt import LanguageModel

_PACKAGE = "modelopt"
_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def require_modelopt(
    option: str = "teacher.quantization=fp8", otherwise: str = "use teacher.quantization=none"
) -> None:
    """InputError if ModelOpt is missing; imports nothing. ``option`` asked for it."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise InputError(
            f"{option} needs the package nvidia-modelopt, which is not installed; "
            f"run launch/setup.sh, or {otherwise}"
        )


def calibrate_fp8(
    model: LanguageModel, run_all: Callable[[torch.nn.Module], None], *, whose: str, remedy: str
) -> None:
    """Put quantizers into the layers' linears and give them the scales of what ``run_all`` computes
    with the model; the weights stay as they are, their products are rounded from here on.

    RunError, about ``whose`` linear and with ``remedy``, where one saw nothing to take a scale
    from.
    """
    with _quietly(), torch.no_grad():
        mtq = importlib.import_module(f"{_PACKAGE}.torch.quantization")
        # Its preset quantises every linear below the module that it is given: the layers.
        mtq.quantize(model.decoder, copy.deepcopy(mtq.FP8_DEFAULT_CFG), run_all)
    _require_scales(model, whose, remedy)


def compress_fp8(model: LanguageModel, *, on_gpu: bool) -> None:
    """Keep the weights of calibrated linears as FP8 numbers. ``on_gpu``: GPUs that multiply FP8
    (compute capability 8.9 or more) do so; elsewhere the rounded operands are multiplied in the
    model's own type.
    """
    with _quietly(), torch.no_grad():
        mtq = importlib.import_module(f"{_PACKAGE}.torch.quantization")
        options = importlib.import_module(f"{_PACKAGE}.torch.quantization.config")
        mtq.compress(model.decoder, options.CompressConfig(quant_gemm=on_gpu))


def fp8_scales(model: LanguageModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parameter name of each calibrated linear -> the scales of its weight and of its inputs,
    float32 scalars: amax / 448, as ModelOpt's exporter has them.
    """

    def scale(quantizer: Any) -> torch.Tensor:
        return (quantizer.amax.float() / quantizer.maxbound).reshape(()).cpu()

    return {
        f"decoder.{name}.weight": (scale(linear.weight_quantizer), scale(linear.input_quantizer))
        for name, linear in quantized_linears(model.decoder)
    }


def quantized_linears(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, linear) of every linear that ModelOpt has replaced."""
    for name, module in model.named_modules():
        if hasattr(module, "weight_quantizer"):
            yield name, module


def _require_scales(model: LanguageModel, whose: str, remedy: str) -> None:
    found = dict(quantized_linears(model.decoder))
    names = sorted(name.rpartition(".")[2] for name in found)
    assert names == sorted(_LINEARS * len(model.decoder.layers)), names
    for name, linear in found.items():
        for quantizer in (linear.input_quantizer, linear.weight_quantizer):
            amax = None if quantizer.amax is None else float(quantizer.amax)
            if amax is None or not 0 < amax < float("inf"):
                raise RunError(
                    f"{whose} {name} has the largest absolute value {amax} on the calibration "
                    f"sequences, which makes no FP8 scale; {remedy}"
                )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """ModelOpt counts its quantizers on stdout, and warns of features that we do not use."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", module=_PACKAGE)
        yield
