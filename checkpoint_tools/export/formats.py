"""The layouts that an export can have: their names in config.json, their code, and whose contracts
they can hold.

``sdar`` is what serving engines load, ``a2d-qwen3`` what dllm and the paper's tools load, ``qwen3``
the plain autoregressive layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.errors import InputError
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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One format for one kind of model (dense, or with experts) as config.json describes it."""

    model_type: str
    architecture: str  # class of the model
    configuration: str = ""  # class of the configuration; empty: transformers' own
    module: str = ""  # the code is configuration_<module>.py and modeling_<module>.py
    auto_classes: tuple[str, ...] = ()  # of transformers, besides AutoConfig

    @property
    def auto_map(self) -> dict[str, str]:
        """Where transformers finds the classes; empty for its own."""
        if not self.module:
            return {}
        classes = dict.fromkeys(self.auto_classes, f"modeling_{self.module}.{self.architecture}")
        return {"AutoConfig": f"configuration_{self.module}.{self.configuration}", **classes}

    @property
    def code(self) -> tuple[Path, ...]:
        """The Python files that the export carries."""
        if not self.module:
            return ()
        own = (f"configuration_{self.module}.py", f"modeling_{self.module}.py")
        return (*(_MODEL / name for name in own), *_SHARED_CODE)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A name of ``export_hf --format``."""

    name: str
    dense: Layout
    experts: Layout | None  # None: the format has no form for them
    served: bool = False  # by SGLang and LMDeploy, which need an explicit lm_head.weight

    @property
    def has_code(self) -> bool:
        """Whether the export decodes blocks by its own ``generate``."""
        return bool(self.dense.module)

    def layout(self, shape: ModelShape) -> Layout:
        """The form for a model of this shape. Raises InputError where there is none."""
        if shape.experts is None:
            return self.dense
        if self.experts is None:
            raise InputError(
                f"--format {self.name}: its readers know no mixture of experts, and the model has "
                f"{shape.experts.count} experts; use --format sdar or qwen3"
            )
        return self.experts

    def exported_shape(self, shape: ModelShape) -> ModelShape:
        """The shape of the export: untied where serving engines read it."""
        return replace(shape, tied=False) if self.served else shape


_CAUSAL = ("AutoModel", "AutoModelForCausalLM")
FORMATS = {
    one.name: one
    for one in (
        Format(
            name="sdar",
            dense=Layout(
                model_type="sdar",
                architecture="SDARForCausalLM",
                configuration="SDARConfig",
                module="sdar",
                auto_classes=_CAUSAL,
            ),
            experts=Layout(
                model_type="sdar_moe",
                architecture="SDARMoeForCausalLM",
                configuration="SDARMoeConfig",
                module="sdar_moe",
                auto_classes=_CAUSAL,
            ),
            served=True,
        ),
        Format(
            name="a2d-qwen3",
            dense=Layout(
                model_type="a2d-qwen3",
                architecture="A2DQwen3LMHeadModel",
                configuration="A2DQwen3Config",
                module="a2d_qwen3",
                auto_classes=("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"),
            ),
            experts=None,
        ),
        Format(
            name="qwen3",
            dense=Layout(model_type="qwen3", architecture="Qwen3ForCausalLM"),
            experts=Layout(model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM"),
        ),
    )
}
LAYOUTS = {
    layout.model_type: layout
    for one in FORMATS.values()
    for layout in (one.dense, one.experts)
    if layout is not None
}


def check_format(name: str, contract: BlockContract, shape: ModelShape) -> None:
    """Refuse what readers of the format would decode otherwise than it was trained."""
    model_format = FORMATS[name]
    model_format.layout(shape)
    if not model_format.has_code:
        return
    if contract.mask_token_id is None:
        raise InputError(
            f"--format {name}: the checkpoint has no mask token; train it with "
            "model.mask_token_id, or import it again with --mask-token-id"
        )
    if contract.logit_shift:
        raise InputError(
            f"--format {name}: the model was trained with loss.logit_shift=true, which readers of "
            "this format do not know; use --format qwen3"
        )
    if contract.block_alignment != "absolute":
        raise InputError(
            f"--format {name}: the model was trained with "
            f"block_alignment={contract.block_alignment}, but readers of this format count blocks "
            "from position 0; use --format qwen3"
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
