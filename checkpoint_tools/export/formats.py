"""The layouts that an export can have (rows of model_files/families.py): their code, and whose
contracts they can hold.

``sdar`` is what serving engines load, ``a2d-...`` what dllm and the paper's tools load; the formats
that bear a family's own name are the plain autoregressive layouts.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import FORMATS, Family, HFLayout
from megatron_opdlm.model_files.manifest import BlockContract
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


def layout_of(name: str, family: Family) -> HFLayout:
    """The family's layout in the format ``name``. Raises InputError where it has none."""
    if name not in family.formats:
        assert name in FORMATS
        reason = "is for other models"
        if name == "sdar":
            reason = "has readers that norm queries and keys, which this model does not"
        elif family.experts:
            reason = "has readers that know no mixture of experts"
        raise InputError(
            f"--format {name} {reason}: it is a {family.name}; use --format "
            + " or ".join(family.formats)
        )
    return family.formats[name]


def exported_shape(shape: ModelShape, layout: HFLayout) -> ModelShape:
    """The shape of the export: untied where serving engines read it."""
    return replace(shape, tied=False) if layout.served else shape


def check_format(name: str, contract: BlockContract, shape: ModelShape) -> None:
    """Refuse what readers of the format would decode otherwise than it was trained."""
    layout, plain = layout_of(name, shape.family), shape.family.plain.format
    if not layout.has_code:
        return
    if contract.mask_token_id is None:
        raise InputError(
            f"--format {name}: the checkpoint has no mask token; train it with "
            "model.mask_token_id, or import it again with --mask-token-id"
        )
    if contract.logit_shift:
        raise InputError(
            f"--format {name}: the model was trained with loss.logit_shift=true, which readers of "
            f"this format do not know; use --format {plain}"
        )
    if contract.block_alignment != "absolute":
        raise InputError(
            f"--format {name}: the model was trained with "
            f"block_alignment={contract.block_alignment}, but readers of this format count blocks "
            f"from position 0; use --format {plain}"
        )


def with_explicit_head(
    get: "Callable[[str], Tensor]", stored: ModelShape
) -> "Callable[[str], Tensor]":
    """``get`` of a checkpoint for readers that need an output layer: a tied one's is the embedding
    once more.
    """
    if not stored.tied:
        return get
    return lambda name: get(_EMBEDDING if name == _HEAD else name)
