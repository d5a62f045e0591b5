"""Files of a Hugging Face directory that are not weights: carried along, and an export's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm import __version__
from megatron_opdlm.model_files.families import BY_TYPE, HFLayout
from megatron_opdlm.model_files.huggingface_files import ADDED, CONTRACT_KEYS
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.model_files.shape import ModelShape, read_json
from megatron_opdlm.model_files.vocabulary import end_tokens, names_end_token, pad_token
from megatron_opdlm.model_files.writing import write_json

EXPORTER_VERSION = f"megatron-opdlm {__version__}"
DEFAULT_BLOCK_SIZE = 4  # what the export of a model that was never trained records
# What configurations of other layouts hold for their own code; ours and plain ones have no use for
# it.
FOREIGN_KEYS = ("attn_implementation", "debug", "ep_size", "fuse_cross_entropy", "micro_forward")
FOREIGN_KEYS += ("skip_checkpoint", "use_deepep")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what another format added: model type, code, block contract."""
    added = ("auto_map", *CONTRACT_KEYS, *FOREIGN_KEYS)
    plain = {k: v for k, v in config.items() if k not in added}
    layout = BY_TYPE[config["model_type"]].plain
    return {**plain, "model_type": layout.model_type, "architectures": [layout.architecture]}


def export_config(
    config: Mapping[str, Any],
    shape: ModelShape,
    contract: BlockContract,
    forbidden_ids: Sequence[int],
    *,
    layout: HFLayout,
    dtype: str,
    trained_thresholds: Sequence[float] = (),
) -> dict[str, Any]:
    """``config.json`` of an export: the family's keys, the block contract, the layout's classes.

    ``shape`` is the export's: untied where the format has it so.
    """
    exported = (
        plain_config(config)
        | {key: config[key] for key in (ADDED,) if key in config}
        | {
            # transformers 4 and serving engines read this flat key and fall back to 10000 without
            # it
            "rope_theta": shape.rope_theta,
            "rope_scaling": shape.rope_scaling.as_config() if shape.rope_scaling else None,
            "tie_word_embeddings": shape.tied,
            "head_dim": shape.head_dim,  # readers of each family have another default
            "block_size": contract.block_size or DEFAULT_BLOCK_SIZE,
            "mask_token_id": contract.mask_token_id,
            "block_alignment": contract.block_alignment,
            "logit_shift": contract.logit_shift,
            "clean_context": contract.clean_context,
            "forbidden_ids": as_ranges(forbidden_ids),
            "trained_block_size": contract.block_size,
            "trained_thresholds": list(trained_thresholds) or None,
            "exporter_version": EXPORTER_VERSION,
        }
    )
    if layout.served:
        exported = _as_sdar_writes(exported, shape)
    stored = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    keys = [key for key in ("dtype", "torch_dtype") if key in exported] or ["torch_dtype"]
    exported |= dict.fromkeys(keys, stored)
    if layout.auto_map:
        exported["auto_map"] = layout.auto_map
    return exported | {"model_type": layout.model_type, "architectures": [layout.architecture]}


def _as_sdar_writes(config: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Every key that serving engines read, explicit and in the spelling of transformers 4."""
    newer = ("rope_parameters", "dtype", "num_local_experts")
    explicit: dict[str, Any] = {
        "num_key_value_heads": shape.groups,
        "rms_norm_eps": shape.rms_eps,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if shape.experts is not None:
        explicit |= {
            "num_experts": shape.experts.count,
            "num_experts_per_tok": shape.experts.per_token,
            "moe_intermediate_size": shape.experts.ffn,
            "norm_topk_prob": shape.experts.renormalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return {key: value for key, value in config.items() if key not in newer} | explicit


def write_generation_config(directory: Path) -> None:
    """Name every end token and the pad token where the carried files leave them to be guessed;
    nothing to write where there are none.
    """
    if not names_end_token(directory):
        return
    path = directory / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    if content.get("eos_token_id") is None or content.get("pad_token_id") is None:
        found = {"eos_token_id": end_tokens(directory), "pad_token_id": pad_token(directory)}
        write_json(path, found | {k: v for k, v in content.items() if v is not None})


def as_ranges(ids: Sequence[int]) -> list[list[int]]:
    """Rising ids -> [first, stop) ranges: ``[3, 4, 7] -> [[3, 5], [7, 8]]``."""
    ranges: list[list[int]] = []
    for value in ids:
        if ranges and ranges[-1][1] == value:
            ranges[-1][1] += 1
        else:
            ranges.append([value, value + 1])
    return ranges
