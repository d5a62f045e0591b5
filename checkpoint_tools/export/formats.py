"""The code of the layouts that an export can have (rows of model_files/families.py), and what they
change of a model.

``sdar`` is what serving engines load, ``a2d-...`` what dllm and the paper's tools load; the formats
that bear a family's own name are the plain autoregressive layouts.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.model_files.families import HFLayout
from megatron_opdlm.model_files.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

# What every export with code carries: the model, and the very files that decide decoding in
# training.
_MODEL = Path(__file__).parents[1] / "hf_modeling"
_DECODING = Path(__file__).parents[2] / "megatron_opdlm" / "diffusion"
_SHARED_CODE = (
    _MODEL / "block_contract.py",
    _MODEL / "block_diffusion.py",
    _MODEL / "fp8_linear.py",
    _DECODING / "blocks.py",
    _DECODING / "denoising.py",
    _DECODING / "randomness.py",
)
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def code_of(layout: HFLayout) -> tuple[Path, ...]:
    """The Python files that an export carries."""
    if not layout.has_code:
        return ()
    own = (f"configuration_{layout.module}.py", f"modeling_{layout.module}.py")
    return (*(_MODEL / name for name in own), *_SHARED_CODE)


def exported_shape(shape: ModelShape, layout: HFLayout) -> ModelShape:
    """The shape of the export: untied where serving engines read it."""
    return replace(shape, tied=False) if layout.served else shape


def with_explicit_head(
    get: "Callable[[str], Tensor]", stored: ModelShape
) -> "Callable[[str], Tensor]":
    """``get`` of a checkpoint for readers that need an output layer: a tied one's is the embedding
    once more.
    """
    if not stored.tied:
        return get
    return lambda name: get(_EMBEDDING if name == _HEAD else name)
