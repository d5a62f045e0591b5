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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.packing import FinishedBatch, Packing, pack_step
from megatron_opdlm.records import Prompt
from megatron_opdlm.states import State
from megatron_opdlm.teacher import score

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


def calibration_sequences(
    prompts: Sequence[Prompt], count: int, max_positions: int
) -> list[list[int]]:
    """The first ``count`` prompts of the file, with their recorded responses where they have one,
    of at most ``max_positions`` tokens: a pure function of the file, so that a resumed run gets the
    same scales.
    """
    return [[*p.ids, *(p.response_ids or [])][:max_positions] for p in prompts[:count]]


def quantize_fp8(
    teacher: LanguageModel, sequences: Sequence[Sequence[int]], packing: Packing
) -> None:
    """Replace the layers' linears by FP8 ones, in place; embedding, norms and output head stay.
    ``sequences``: token ids, the same on every rank.

    The weights are kept as FP8 numbers. GPUs that multiply FP8 (compute capability 8.9 or more) do
    so; elsewhere the rounded operands are multiplied in the model's own type. RunError where a
    linear saw nothing to take a scale from.
    """
    batches = _calibration_batches(sequences, packing)

    def run_all(_: torch.nn.Module) -> None:
        for batch in batches:  # one at a time: the hidden states are not kept
            score(teacher, [batch])

    calibrate_fp8(
        teacher,
        run_all,
        whose="the teacher's",
        remedy="check teacher.path, or use teacher.quantization=none",
    )
    with _quietly(), torch.no_grad():
        mtq = importlib.import_module(f"{_PACKAGE}.torch.quantization")
        on_gpu = packing.device.type != "cpu"
        options = importlib.import_module(f"{_PACKAGE}.torch.quantization.config")
        mtq.compress(teacher.decoder, options.CompressConfig(quant_gemm=on_gpu))
    teacher.requires_grad_(False)


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


def _calibration_batches(
    sequences: Sequence[Sequence[int]], packing: Packing
) -> list[FinishedBatch]:
    """Questions that make the teacher compute every layer at every token.

    A token is computed where the next one is asked for, so the last token is repeated.
    """
    states = [
        State(
            sample=number,
            prompt_ids=[*ids[:1]],
            response_ids=[*ids[1:], ids[-1]],
            masked=[True] * len(ids),
            counted=[True] * len(ids),
            trained_tokens=0,
        )
        for number, ids in enumerate(sequences)
    ]
    return pack_step([states], packing).finished


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
