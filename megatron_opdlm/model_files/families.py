"""The families of models that are read, trained and exported, in one table: ``FAMILIES``.

All of them are decoders of pre-norm layers: RMS norms, rotary positions (rotary.py), grouped-query
attention, a gated MLP of SiLU or a mixture of such experts. A row says what differs: norms and
biases of the attention, what ``config.json`` may leave out, and the layouts of an export. Whatever
depends on the family reads the row: nobody asks for a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

QKV = "self_attention.linear_qkv.weight"
QKV_BIAS = "self_attention.linear_qkv.bias"
PROJ = "self_attention.linear_proj.weight"
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"
ROUTER = "mlp.router.weight"
EXPERT_FC1 = "mlp.experts.linear_fc1.weight"
EXPERT_FC2 = "mlp.experts.linear_fc2.weight"

# Attribute of a Megatron layer -> the Hugging Face tensors of that layer that it joins, in order.
Sources = Mapping[str, tuple[str, ...]]
_INPUT_NORM: Sources = {"input_layernorm.weight": ("input_layernorm.weight",)}
_QKV: Sources = {
    QKV: ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
}
_QKV_BIAS: Sources = {
    QKV_BIAS: ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
}
_QK_NORM: Sources = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
_PROJ: Sources = {PROJ: ("self_attn.o_proj.weight",)}
_MLP_NORM: Sources = {"pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",)}
_MLP: Sources = {
    FC1: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    FC2: ("mlp.down_proj.weight",),
}
_ROUTER: Sources = {ROUTER: ("mlp.gate.weight",)}
# The same of one expert, whose number stands in the braces.
EXPERT_SOURCES: Sources = {
    EXPERT_FC1: ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    EXPERT_FC2: ("mlp.experts.{}.down_proj.weight",),
}


@dataclass(frozen=True, kw_only=True)
class HFLayout:
    """How a model of the family looks in one format: its names in ``config.json``, and its code."""

    format: str  # name of ``export_hf --format``
    model_type: str
    architecture: str  # class of the model
    configuration: str = ""  # class of the configuration; empty: transformers' own
    module: str = ""  # the code is configuration_<module>.py and modeling_<module>.py
    auto_classes: tuple[str, ...] = ()  # of transformers, besides AutoConfig
    served: bool = False  # by SGLang and LMDeploy, which need an explicit lm_head.weight

    @property
    def has_code(self) -> bool:
        """Whether the export decodes blocks by its own ``generate``."""
        return bool(self.module)

    @property
    def auto_map(self) -> dict[str, str]:
        """Where transformers finds the classes; empty for its own."""
        if not self.module:
            return {}
        classes = dict.fromkeys(self.auto_classes, f"modeling_{self.module}.{self.architecture}")
        return {"AutoConfig": f"configuration_{self.module}.{self.configuration}", **classes}


@dataclass(frozen=True, kw_only=True, repr=False)
class Family:
    """A row of the table."""

    name: str  # as its authors write it
    transformers: str  # what its classes there are named after: LlamaConfig, LlamaForCausalLM
    layouts: tuple[HFLayout, ...] = field(compare=False)
    also: tuple[str, ...] = ()  # model types of others with the same tensors and arithmetic
    qk_norm: bool = False  # queries and keys are normed, head by head
    qkv_bias: bool = False  # queries, keys and values have biases
    experts: bool = False  # a mixture of experts in every layer in place of the MLP
    # What the family's configurations mean where they leave these out.
    head_dim: int | None = None  # None: hidden size / heads
    rope_theta: float | None = None  # None: nothing, it must be written

    @property
    def formats(self) -> dict[str, HFLayout]:
        """The layouts by the names of their formats."""
        return {layout.format: layout for layout in self.layouts}

    @property
    def plain(self) -> HFLayout:
        """The layout that transformers reads as an ordinary autoregressive model."""
        return next(layout for layout in self.layouts if not layout.has_code)

    @property
    def block_diffusion(self) -> HFLayout:
        """The layout of an export that decodes blocks, unless another is asked for."""
        return next(layout for layout in self.layouts if layout.has_code)

    def __repr__(self) -> str:
        return self.name

    @cached_property
    def layer_sources(self) -> Sources:
        """The tensors of a layer but its experts', in the order in which they are listed."""
        attention = {
            **_INPUT_NORM,
            **_QKV,
            **(_QKV_BIAS if self.qkv_bias else {}),
            **(_QK_NORM if self.qk_norm else {}),
            **_PROJ,
            **_MLP_NORM,
        }
        return {**attention, **(_ROUTER if self.experts else _MLP)}


_CAUSAL = ("AutoModel", "AutoModelForCausalLM")


def _a2d(family: str) -> HFLayout:
    """The layout of dllm and the paper's tools."""
    return HFLayout(
        format=f"a2d-{family.lower()}",
        model_type=f"a2d-{family.lower()}",
        architecture=f"A2D{family}LMHeadModel",
        configuration=f"A2D{family}Config",
        module="a2d",
        auto_classes=("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"),
    )


def _sdar(model_type: str, name: str) -> HFLayout:
    """The layout that serving engines read, whose attention norms queries and keys."""
    return HFLayout(
        format="sdar",
        model_type=model_type,
        architecture=f"{name}ForCausalLM",
        configuration=f"{name}Config",
        module=model_type,
        auto_classes=_CAUSAL,
        served=True,
    )


def _plain(name: str, model_type: str, transformers: str) -> HFLayout:
    return HFLayout(format=name, model_type=model_type, architecture=f"{transformers}ForCausalLM")


QWEN3 = Family(
    name="Qwen3",
    transformers="Qwen3",
    layouts=(_a2d("Qwen3"), _sdar("sdar", "SDAR"), _plain("qwen3", "qwen3", "Qwen3")),
    qk_norm=True,
    head_dim=128,
)
QWEN3_MOE = Family(
    name="Qwen3-MoE",
    transformers="Qwen3Moe",
    layouts=(_sdar("sdar_moe", "SDARMoe"), _plain("qwen3", "qwen3_moe", "Qwen3Moe")),
    qk_norm=True,
    experts=True,
)
QWEN2 = Family(  # and Qwen2.5
    name="Qwen2",
    transformers="Qwen2",
    layouts=(_a2d("Qwen2"), _plain("qwen2", "qwen2", "Qwen2")),
    qkv_bias=True,
)
LLAMA = Family(  # 1 to 3, SmolLM2 and the many others of this architecture
    name="Llama",
    transformers="Llama",
    layouts=(_a2d("Llama"), _plain("llama", "llama", "Llama")),
    also=("mistral",),  # without sliding windows it is the same model
    rope_theta=10000.0,
)
FAMILIES = (QWEN3, QWEN3_MOE, QWEN2, LLAMA)

LAYOUTS = {one.model_type: one for family in FAMILIES for one in family.layouts}
FORMATS = tuple(dict.fromkeys(one.format for one in LAYOUTS.values()))
BY_TYPE = {
    model_type: family
    for family in FAMILIES
    for model_type in (*(one.model_type for one in family.layouts), *family.also)
}
