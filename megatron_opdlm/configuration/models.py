"""Sections on the models: the student, its teacher, low-rank terms, attention."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_opdlm.keys import key

Precision = Literal["auto", "fp32", "bf16"]
Recompute = Literal["false", "true", "attention", "mlp"]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


DTYPE_HELP = (
    "type of the weights; auto: bf16 on a GPU, and for models of 50 million parameters and more on "
    "a CPU that multiplies in it (AMX, AVX512-BF16); else fp32"
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student, and the layout that student and teacher share (docs/parallelism.md)."""

    path: str = key("", "Hugging Face directory or Megatron checkpoint to start from", is_path=True)
    mask_token_id: int | None = key(
        None, "id of the mask token; null: the tokenizer's, else 151669 where it fits", at_least=0
    )
    tensor_parallel: int = key(
        1,
        "tensor-parallel ranks: they share every layer",
        unit="ranks",
        at_least=1,
        may_change=True,
    )
    pipeline_parallel: int = key(
        1,
        "pipeline-parallel ranks: they share out the layers",
        unit="ranks",
        at_least=1,
        may_change=True,
    )
    context_parallel: int = key(
        1,
        "context-parallel ranks: they share every packed row, its tokens and during attention its "
        "heads, so it divides the heads of a tensor rank; for rows too long for one rank's memory",
        unit="ranks",
        at_least=1,
        may_change=True,
    )
    expert_parallel: int = key(
        1,
        "expert-parallel ranks: they share out the experts of a mixture, among those of data and "
        "context parallelism; divides their number and that of the experts",
        unit="ranks",
        at_least=1,
        may_change=True,
    )
    sequence_parallel: bool = key(
        False, "tensor ranks share out the tokens between the linears, too", may_change=True
    )
    dtype: Precision = key("auto", DTYPE_HELP)
    max_positions: int | None = key(
        None,
        "of a prompt and its response together; null: the model's limit",
        unit="tokens",
        at_least=1,
    )
    spec: Literal["auto", "local", "te"] = key(
        "auto",
        "layers: te = Transformer Engine's (fused norms), local = Megatron's own; auto: te where "
        "it is installed, on GPUs in 16 bits; checkpoints are the same",
        may_change=True,
    )
    recompute: Recompute = key(
        "false",
        "recompute activations in the backward pass (less memory, more time): true = of whole "
        "layers, mlp or attention = of these parts only",
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen autoregressive model whose distributions are the targets (docs/teacher.md)."""

    path: str = key(
        "", "as model.path; empty: the same weights as the student's start", is_path=True
    )
    dtype: Precision = key("auto", DTYPE_HELP)
    quantization: Literal["none", "fp8"] = key(
        "none", "fp8: the layers' linears get E4M3 weights and activations"
    )
    calibration_prompts: int = key(
        64,
        "first prompts of data.path, on which fp8's scales are taken",
        unit="prompts",
        at_least=1,
    )
    temperature: float = key(1.0, "divides its logits; above 1 a flatter target", above=0)
    top_p: float = key(
        1.0,
        "below 1: the target is the nucleus of this mass, renormalised",
        unit="probability",
        above=0,
        at_most=1,
    )
    targets: Literal["hidden", "top_k"] = key(
        "hidden",
        "what is kept of its answer at a position: its final hidden state, or the loss.top_k "
        "largest entries of its distribution",
    )
    offload_targets: bool = key(
        False, "keep targets in host memory between the phases", may_change=True
    )
    offload_weights: bool = key(
        False, "its layers wait in host memory while it is not asked", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank terms (alpha / rank) B A beside frozen weights (docs/lora.md)."""

    rank: int = key(
        0, "features between A and B; 0: all weights are trained", unit="features", at_least=0
    )
    alpha: float = key(16.0, "scale of the terms, over the rank", above=0)
    targets: list[LoraTarget] = key(list(LORA_TARGETS), "Megatron's linears that get terms")
    share_teacher: bool = key(
        True, "the frozen base is the teacher where teacher.path is model.path", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Who computes attention of packed rows (docs/attention.md); decoding has its own."""

    backend: Literal["auto", "dense", "flex", "te"] = key(
        "auto", "auto: dense on a CPU; on GPUs flex, for the teacher te where it is installed"
    )
