"""What engines demand of a quantised export, as checks on its files. Read in the sources of SGLang
(``layers/quantization/modelopt_quant.py``, ``models/sdar.py``) and LMDeploy
(``pytorch/nn/linear``); neither was run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.quantization.export import ENGINE_RECORD
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import LAYOUTS
from megatron_opdlm.model_files.shape import read_json, read_shape


def quantized_weights(directory: Path) -> tuple[str, str]:
    """(problem, note): no tensor is missing, unexpected or of another shape or type, and every
    scale is a positive number. Raises InputError for broken files.
    """
    from checkpoint_tools.quantization.fp8_weights import Fp8Weights

    with Fp8Weights(directory, read_shape(directory, allow_quantized=True)) as weights:
        for name in weights.quantized:
            for of in ("weight", "input"):
                scale = float(weights.scale(name, of))
                if not 0 < scale < math.inf:
                    return f"{of}_scale of {name} is {scale}", ""
        return "", f"{len(weights.quantized)} linears in FP8"


def _sglang(directory: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """(problem, note): it takes ``quant_algo`` and ``ignore`` from config.json, older versions what
    hf_quant_config.json says. Raises InputError where that is missing.
    """
    described = _record(config, "quantization_config", "config.json")
    older = _record(read_json(directory / ENGINE_RECORD), "quantization", ENGINE_RECORD)
    for where, algorithm, ignored in (
        ("config.json", described.get("quant_algo"), described.get("ignore")),
        (ENGINE_RECORD, older.get("quant_algo"), older.get("exclude_modules")),
    ):
        if algorithm != "FP8":
            return f"{where} has quant_algo={algorithm!r}, not 'FP8'", ""
        if not isinstance(ignored, list) or "lm_head" not in ignored:
            return f"{where} does not say that lm_head is not quantised", ""
    if described.get("quant_method") != "modelopt":
        return f"quant_method={described.get('quant_method')!r} is not 'modelopt'", ""
    return "", "GPUs from compute capability 8.9"


def _lmdeploy(directory: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Its linears know other checkpoints."""
    method = _record(config, "quantization_config", "config.json").get("quant_method")
    return f"quant_method={method!r} is none of awq, smooth_quant and fp8", ""


def _transformers(directory: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """(problem, note): it skips a ``quant_method`` that it does not know; our code does not."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is not None and not layout.has_code:
        return "it does not know quant_method='modelopt' and would read FP8 numbers unscaled", ""
    return "", "the export's own FP8 linears; slow"


def _record(content: Mapping[str, Any], key: str, file: str) -> dict[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"{file}: {key}={found!r} is no JSON object")
    return found


QUANTIZED_READERS = {"SGLang": _sglang, "LMDeploy": _lmdeploy, "transformers": _transformers}
