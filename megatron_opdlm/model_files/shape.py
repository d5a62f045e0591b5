"""The shape of a Qwen3: read from ``config.json`` with every check, before torch is imported."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.file_kinds import foreign_kind

DENSE_TYPES = ("qwen3", "a2d-qwen3", "sdar")
EXPERT_TYPES = ("qwen3_moe", "sdar_moe")
MODEL_TYPES = DENSE_TYPES + EXPERT_TYPES
_MOST_PARTS = 1_000_000  # layers, times the experts in each: names are listed one by one


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands in every layer of a Qwen3-MoE in place of its MLP."""

    count: int
    per_token: int  # experts that work on a token
    ffn: int  # width of one expert
    renormalize: bool  # the chosen experts' probabilities are scaled to sum 1


@dataclass(frozen=True)
class ModelShape:
    """What of a Qwen3 ``config.json`` decides tensor shapes and arithmetic."""

    layers: int
    hidden: int
    heads: int  # query heads
    groups: int  # key/value heads; divides heads
    head_dim: int
    ffn: int  # width of the MLP; of no layer where there are experts
    vocab_size: int  # rows of the embedding: the softmax runs over these
    tied: bool  # the output layer is the embedding
    rope_theta: float
    rms_eps: float
    max_positions: int
    experts: Experts | None = None  # None: a dense Qwen3

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in hf_names(self).values())

    @property
    def active_parameters(self) -> int:
        """Number of parameters that work on a token: all but the experts that it is not sent to."""
        if self.experts is None:
            return self.parameters
        idle = self.experts.count - self.experts.per_token
        return self.parameters - self.layers * idle * 3 * self.hidden * self.experts.ffn


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError when the file is missing or holds something else."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; give a complete model directory")
    kind = foreign_kind(path)
    if kind is not None:
        raise InputError(f"{path} is {kind}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}, not a JSON object; copy it again"
        )
    return content


def read_shape(hf_dir: Path, *, allow_quantized: bool = False) -> ModelShape:
    """The shape of the Qwen3 in a Hugging Face directory. ``allow_quantized``: the caller reads the
    quantised weights himself.

    Raises InputError for everything that we would compute wrongly: other architectures, biases,
    sliding windows, scaled rotary positions, quantised weights.
    """
    path = Path(hf_dir) / "config.json"
    if not Path(hf_dir).is_dir():
        raise InputError(f"{hf_dir} is not a directory; give a Hugging Face Qwen3 directory")
    config = read_json(path)
    _refuse_other_architectures(config, path)
    if config.get("quantization_config") and not allow_quantized:
        raise InputError(f"{path}: weights are quantised; use the unquantised (bf16 or fp32) model")
    heads = _positive(config, "num_attention_heads", path)
    shape = ModelShape(
        layers=_positive(config, "num_hidden_layers", path),
        hidden=_positive(config, "hidden_size", path),
        heads=heads,
        groups=_positive(config, "num_key_value_heads", path, default=heads),
        head_dim=_head_dim(config, path),
        ffn=_positive(config, "intermediate_size", path),
        vocab_size=_positive(config, "vocab_size", path),
        tied=_flag(config, "tie_word_embeddings", path),
        rope_theta=_rope_theta(config, path),
        rms_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        max_positions=_positive(config, "max_position_embeddings", path, default=32768),
        experts=_experts(config, path) if config["model_type"] in EXPERT_TYPES else None,
    )
    if shape.layers * (shape.experts.count if shape.experts else 1) > _MOST_PARTS:
        raise InputError(
            f"{path}: num_hidden_layers={shape.layers} is beyond any Qwen3; correct the file"
        )
    if shape.heads % shape.groups:
        raise InputError(
            f"{path}: num_key_value_heads={shape.groups} does not divide "
            f"num_attention_heads={shape.heads}; this is no valid Qwen3 configuration"
        )
    if shape.head_dim % 2:
        raise InputError(f"{path}: head_dim={shape.head_dim} is odd; rotary positions need it even")
    return shape


def hf_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model and its shape; ``lm_head.weight`` only if untied."""
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.groups * shape.head_dim
    of_layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
    } | _mlp_names(shape)
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.layers):
        names |= {f"model.layers.{layer}.{name}": size for name, size in of_layer.items()}
    names["model.norm.weight"] = (hidden,)
    if not shape.tied:
        names["lm_head.weight"] = (shape.vocab_size, hidden)
    return names


def _mlp_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    def gated(prefix: str, ffn: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (ffn, shape.hidden),
            f"{prefix}.up_proj.weight": (ffn, shape.hidden),
            f"{prefix}.down_proj.weight": (shape.hidden, ffn),
        }

    if shape.experts is None:
        return gated("mlp", shape.ffn)
    names: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (shape.experts.count, shape.hidden)}
    for expert in range(shape.experts.count):
        names |= gated(f"mlp.experts.{expert}", shape.experts.ffn)
    return names


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Rows of the embedding at this tensor parallelism: the smallest multiple of ``tp`` that has
    room for the vocabulary."""
    return -(-vocab_size // tp) * tp


def check_layout(shape: ModelShape, tp: int, pp: int, name: str, cp: int = 1, ep: int = 1) -> None:
    """Refuse a parallel layout that does not divide the model, whose ``name`` the message gives."""
    sizes = (
        ("tensor_parallel", tp),
        ("pipeline_parallel", pp),
        ("context_parallel", cp),
        ("expert_parallel", ep),
    )
    for size, value in sizes:
        if value < 1:
            raise InputError(f"{size}={value} is not positive; use 1 or more")
    width, ffn = ("ffn_hidden_size", shape.ffn)
    if shape.experts is not None:
        width, ffn = ("moe_intermediate_size", shape.experts.ffn)
    for what, count in (("num_query_groups", shape.groups), (width, ffn)):
        if count % tp:
            usable = [n for n in range(1, shape.groups + 1) if not (shape.groups % n or ffn % n)]
            raise InputError(
                f"tensor_parallel={tp} does not divide {what}={count} ({name}); "
                f"use {_choices(usable)}"
            )
    if shape.layers % pp:
        usable = [n for n in range(1, shape.layers + 1) if shape.layers % n == 0]
        raise InputError(
            f"pipeline_parallel={pp} does not divide num_layers={shape.layers} ({name}); "
            f"use {_choices(usable)}"
        )
    heads = shape.heads // tp
    if heads % cp:  # context ranks share each tensor rank's heads during attention
        usable = [n for n in range(1, heads + 1) if heads % n == 0]
        raise InputError(
            f"context_parallel={cp} does not divide the {heads} attention heads of a tensor rank "
            f"(num_attention_heads={shape.heads} / tensor_parallel={tp}, {name}); "
            f"use {_choices(usable)}"
        )
    experts = shape.experts.count if shape.experts else 1
    if ep > 1 and shape.experts is None:
        raise InputError(
            f"expert_parallel={ep} shares out experts, and {name} has none; use expert_parallel=1"
        )
    if experts % ep:
        usable = [n for n in range(1, experts + 1) if experts % n == 0]
        raise InputError(
            f"expert_parallel={ep} does not divide num_experts={experts} ({name}); "
            f"use {_choices(usable)}"
        )


def _choices(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _refuse_other_architectures(config: Mapping[str, Any], path: Path) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{path}: model_type={model_type!r} is no Qwen3; use a directory with model_type "
            + " or ".join(map(repr, MODEL_TYPES))
        )
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: hidden_act={config['hidden_act']!r}; only Qwen3's 'silu' is built"
        )
    if config.get("attention_bias", False):
        raise InputError(f"{path}: attention_bias=true; only Qwen3's bias-free attention is built")
    for key in ("layer_types", "architectures"):
        if not isinstance(config.get(key) or [], list):
            raise InputError(f"{path}: {key}={config[key]!r} is no list; correct the file")
    sliding = config.get("use_sliding_window", False) and config.get("sliding_window")
    if sliding or "sliding_attention" in (config.get("layer_types") or ()):
        raise InputError(
            f"{path}: sliding-window attention is not built; set use_sliding_window to false if "
            "sequences stay inside the window"
        )


def _experts(config: Mapping[str, Any], path: Path) -> Experts:
    """The experts of a Qwen3-MoE, which all published ones have in every layer."""
    for architecture in config.get("architectures") or ():
        if architecture != "Qwen3MoeForCausalLM" and config["model_type"] == "qwen3_moe":
            raise InputError(
                f"{path}: architectures has {architecture!r}; use a language model, "
                "'Qwen3MoeForCausalLM'"
            )
    if config.get("decoder_sparse_step", 1) != 1:
        raise InputError(
            f"{path}: decoder_sparse_step={config['decoder_sparse_step']!r} mixes layers with and "
            "without experts; only 1 (experts in every layer) is built"
        )
    if config.get("mlp_only_layers"):
        raise InputError(
            f"{path}: mlp_only_layers={config['mlp_only_layers']!r} mixes layers with and without "
            "experts; only [] (experts in every layer) is built"
        )
    # Transformers 5 writes num_local_experts, published configurations have num_experts.
    written = [key for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    counts = {_positive(config, key, path) for key in written or ["num_experts"]}
    if len(counts) > 1:
        raise InputError(
            f"{path}: num_experts={config['num_experts']} and "
            f"num_local_experts={config['num_local_experts']} disagree; correct the file"
        )
    experts = Experts(
        count=counts.pop(),
        per_token=_positive(config, "num_experts_per_tok", path),
        ffn=_positive(config, "moe_intermediate_size", path),
        renormalize=_flag(config, "norm_topk_prob", path),
    )
    if experts.per_token > experts.count:
        raise InputError(
            f"{path}: num_experts_per_tok={experts.per_token} exceeds "
            f"num_experts={experts.count}; this is no valid Qwen3-MoE configuration"
        )
    return experts


def _rope_theta(config: Mapping[str, Any], path: Path) -> float:
    """Transformers 4 writes a flat ``rope_theta``, transformers 5 a ``rope_parameters`` record."""
    for key in ("rope_parameters", "rope_scaling"):
        record = config.get(key) or {}
        if not isinstance(record, dict):
            raise InputError(f"{path}: {key}={record!r} is no JSON object; copy the file again")
        kind = record.get("rope_type", record.get("type", "default"))
        if kind != "default":
            raise InputError(
                f"{path}: {key} has rope_type={kind!r}; only 'default' is built, so remove it and "
                "stay within the original context length"
            )
    nested = (config.get("rope_parameters") or {}).get("rope_theta")
    theta = nested if nested is not None else config.get("rope_theta")
    if theta is None:
        raise InputError(f"{path} has no rope_theta; add the value that the model was trained with")
    return _number(theta, "rope_theta", path)


def _positive(config: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{path} has no {key}; this is no complete Qwen3 configuration")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: {key}={value!r} is not a positive integer; correct the file")
    return value


def _head_dim(config: Mapping[str, Any], path: Path) -> int:
    """transformers' default is 128 for Qwen3; its Qwen3-MoE has no such key and divides."""
    default = 128
    if config["model_type"] in EXPERT_TYPES and config.get("head_dim") is None:
        hidden = _positive(config, "hidden_size", path)
        heads = _positive(config, "num_attention_heads", path)
        default = hidden // heads
        if hidden % heads:
            raise InputError(
                f"{path}: num_attention_heads={heads} does not divide hidden_size={hidden}, and "
                "there is no head_dim; add the one that the model was trained with"
            )
    return _positive(config, "head_dim", path, default=default)


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key}={value!r} is neither true nor false; correct the file")
    return value


def _number(value: Any, key: str, path: Path) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= sys.float_info.max:  # NaN is in no range
        return float(value)
    raise InputError(f"{path}: {key}={value!r:.60} is not a positive number; correct the file")
