"""The shape of a model: read from ``config.json`` with every check, before torch is imported."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.config_values import flag, number, positive
from megatron_opdlm.model_files.families import BY_TYPE, EXPERT_SOURCES, QWEN3, Family
from megatron_opdlm.model_files.file_kinds import foreign_kind
from megatron_opdlm.model_files.rotary import RotaryScaling, read_scaling, read_theta

_MOST_PARTS = 1_000_000  # layers, times the experts in each: names are listed one by one


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands in every layer in place of its MLP."""

    count: int
    per_token: int  # experts that work on a token
    ffn: int  # width of one expert
    renormalize: bool  # the chosen experts' probabilities are scaled to sum 1


@dataclass(frozen=True)
class ModelShape:
    """What of a ``config.json`` decides tensor shapes and arithmetic."""

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
    experts: Experts | None = None  # None: a dense model
    family: Family = QWEN3
    rope_scaling: RotaryScaling | None = None  # None: positions as they were trained

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in hf_names(self).values())

    @cached_property
    def layer_parameters(self) -> int:
        """Number of parameters of a layer, without those of its experts."""
        sizes = _layer_sizes(self)
        sources = self.family.layer_sources.values()
        return sum(math.prod(sizes[source]) for joined in sources for source in joined)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that work on a token: all but the experts that it is not sent to."""
        if self.experts is None:
            return self.parameters
        idle = self.experts.count - self.experts.per_token
        return self.parameters - self.layers * idle * 3 * self.hidden * self.experts.ffn


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a key stands twice: {next(n for n in names if names.count(n) > 1)!r}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError when the file is missing or holds something else."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; give a complete model directory")
    kind = foreign_kind(path)
    if kind is not None:
        raise InputError(f"{path} is {kind}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}, not a JSON object; copy it again"
        )
    return content


def read_shape(hf_dir: Path, *, allow_quantized: bool = False) -> ModelShape:
    """The shape of the model in a Hugging Face directory. ``allow_quantized``: the caller reads the
    quantised weights himself.

    Raises InputError for everything that we would compute wrongly: other architectures, biases that
    the family has not, sliding windows, unknown scalings of rotary positions, quantised weights.
    """
    path = Path(hf_dir) / "config.json"
    if not Path(hf_dir).is_dir():
        raise InputError(f"{hf_dir} is not a directory; give a Hugging Face model directory")
    config = read_json(path)
    family = read_family(config, path)
    _refuse_other_arithmetic(config, path)
    if config.get("quantization_config") and not allow_quantized:
        raise InputError(f"{path}: weights are quantised; use the unquantised (bf16 or fp32) model")
    heads = positive(config, "num_attention_heads", path)
    positions = positive(config, "max_position_embeddings", path, default=32768)
    shape = ModelShape(
        layers=positive(config, "num_hidden_layers", path),
        hidden=positive(config, "hidden_size", path),
        heads=heads,
        groups=positive(config, "num_key_value_heads", path, default=heads),
        head_dim=_head_dim(config, family, path),
        ffn=positive(config, "intermediate_size", path),
        vocab_size=positive(config, "vocab_size", path),
        tied=flag(config, "tie_word_embeddings", path),
        rope_theta=read_theta(config, path, family.rope_theta),
        rms_eps=number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        max_positions=positions,
        experts=_experts(config, path) if family.experts else None,
        family=family,
        rope_scaling=read_scaling(config, path, positions),
    )
    if shape.layers * (shape.experts.count if shape.experts else 1) > _MOST_PARTS:
        raise InputError(
            f"{path}: num_hidden_layers={shape.layers} is beyond any model; correct the file"
        )
    if shape.heads % shape.groups:
        raise InputError(
            f"{path}: num_key_value_heads={shape.groups} does not divide "
            f"num_attention_heads={shape.heads}; this is no valid configuration"
        )
    if shape.head_dim % 2:
        raise InputError(f"{path}: head_dim={shape.head_dim} is odd; rotary positions need it even")
    return shape


def hf_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model and its shape; ``lm_head.weight`` only if untied."""
    sizes = _layer_sizes(shape)
    of_layer = [source for joined in shape.family.layer_sources.values() for source in joined]
    if shape.experts is not None:
        of_expert = [source for joined in EXPERT_SOURCES.values() for source in joined]
        of_layer += [name.format(i) for i in range(shape.experts.count) for name in of_expert]
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, shape.hidden)
    }
    for layer in range(shape.layers):
        names |= {f"model.layers.{layer}.{name}": sizes[name] for name in of_layer}
    names["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        names["lm_head.weight"] = (shape.vocab_size, shape.hidden)
    return names


def _layer_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of each tensor that a layer of any family can have."""
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.groups * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.bias": (key,),
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
    } | _gated_sizes("mlp", hidden, shape.ffn)
    if shape.experts is not None:
        sizes["mlp.gate.weight"] = (shape.experts.count, hidden)
        for expert in range(shape.experts.count):
            sizes |= _gated_sizes(f"mlp.experts.{expert}", hidden, shape.experts.ffn)
    return sizes


def _gated_sizes(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


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


def read_family(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json; InputError where it is none of the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_TYPE:
        raise InputError(
            f"{path}: model_type={model_type!r} is no model that is built; use a directory with "
            "model_type " + " or ".join(map(repr, BY_TYPE))
        )
    return BY_TYPE[model_type]


def _refuse_other_arithmetic(config: Mapping[str, Any], path: Path) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act={config['hidden_act']!r}; only 'silu' is built")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key, False):
            raise InputError(
                f"{path}: {key}=true; of biases only those of queries, keys and values are built, "
                "and only in Qwen2"
            )
    for key in ("layer_types", "architectures"):
        if not isinstance(config.get(key) or [], list):
            raise InputError(f"{path}: {key}={config[key]!r} is no list; correct the file")
    # Mistral has no switch, and a window where the key is missing.
    always = config.get("model_type") == "mistral"
    window = config.get("sliding_window", 4096 if always else None)
    sliding = window and config.get("use_sliding_window", always)
    if sliding or "sliding_attention" in (config.get("layer_types") or ()):
        switch = "sliding_window to null" if always else "use_sliding_window to false"
        raise InputError(
            f"{path}: sliding-window attention is not built; set {switch} if sequences stay inside "
            "the window"
        )


def _experts(config: Mapping[str, Any], path: Path) -> Experts:
    """The experts, which all published Qwen3-MoE have in every layer."""
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
    counts = {positive(config, key, path) for key in written or ["num_experts"]}
    if len(counts) > 1:
        raise InputError(
            f"{path}: num_experts={config['num_experts']} and "
            f"num_local_experts={config['num_local_experts']} disagree; correct the file"
        )
    experts = Experts(
        count=counts.pop(),
        per_token=positive(config, "num_experts_per_tok", path),
        ffn=positive(config, "moe_intermediate_size", path),
        renormalize=flag(config, "norm_topk_prob", path),
    )
    if experts.per_token > experts.count:
        raise InputError(
            f"{path}: num_experts_per_tok={experts.per_token} exceeds "
            f"num_experts={experts.count}; this is no valid Qwen3-MoE configuration"
        )
    return experts


def _head_dim(config: Mapping[str, Any], family: Family, path: Path) -> int:
    """As config.json has it, else as transformers' class of the family takes it."""
    default = family.head_dim
    if default is None and config.get("head_dim") is None:
        hidden = positive(config, "hidden_size", path)
        heads = positive(config, "num_attention_heads", path)
        default = hidden // heads
        if hidden % heads:
            raise InputError(
                f"{path}: num_attention_heads={heads} does not divide hidden_size={hidden}, and "
                "there is no head_dim; add the one that the model was trained with"
            )
    return positive(config, "head_dim", path, default=default)
