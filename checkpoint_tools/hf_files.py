"""Files of a Hugging Face directory that are not weights: carried along, and an export's own."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_tools.manifest import BlockContract
from checkpoint_tools.qwen3_shape import Qwen3Shape

EXPORTER_VERSION = "megatron-opdlm 0.1"
DEFAULT_BLOCK_SIZE = 4  # what the export of a model that was never trained records
CARRIED = (".json", ".jinja", ".txt", ".model")  # no weights, and no code: an export ships its own
CONTRACT_KEYS = (
    "block_size",
    "mask_token_id",
    "block_alignment",
    "logit_shift",
    "clean_context",
    "forbidden_ids",
    "exporter_version",
)
# The code of an a2d-qwen3 export: the model, and the very files that decide decoding in training.
_MODEL = Path(__file__).parent / "hf_modeling"
_DECODING = Path(__file__).parents[1] / "megatron_opdlm" / "diffusion"
CODE_FILES = (
    _MODEL / "configuration_a2d_qwen3.py",
    _MODEL / "modeling_a2d_qwen3.py",
    _DECODING / "blocks.py",
    _DECODING / "denoising.py",
    _DECODING / "randomness.py",
)


def carry_over(hf_dir: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template; no weights, no index, no code."""
    target.mkdir(exist_ok=True)
    for path in sorted(hf_dir.iterdir()):
        if path.is_file() and path.suffix in CARRIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name)


def plain_qwen3_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what another format added: model type, code, block contract."""
    plain = {k: v for k, v in config.items() if k not in ("auto_map", *CONTRACT_KEYS)}
    return {**plain, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def read_contract(config: dict[str, Any], mask_token_id: int | None) -> BlockContract:
    """The block contract that a config records, as our exports do; Qwen3's own records none."""
    recorded = {
        key: config[key]
        for key in ("block_size", "block_alignment", "logit_shift", "clean_context")
        if key in config
    }
    return BlockContract(mask_token_id=mask_token_id, **recorded)


def export_config(
    config: dict[str, Any],
    shape: Qwen3Shape,
    contract: BlockContract,
    forbidden_ids: Sequence[int],
    *,
    model_format: str,
    dtype: str,
) -> dict[str, Any]:
    """``config.json`` of an export: Qwen3's keys, the block contract, the classes of the format."""
    exported = plain_qwen3_config(config) | {
        # transformers 4 and serving engines read this flat key and fall back to 10000 without it
        "rope_theta": shape.rope_theta,
        "block_size": contract.block_size or DEFAULT_BLOCK_SIZE,
        "mask_token_id": contract.mask_token_id,
        "block_alignment": contract.block_alignment,
        "logit_shift": contract.logit_shift,
        "clean_context": contract.clean_context,
        "forbidden_ids": as_ranges(forbidden_ids),
        "exporter_version": EXPORTER_VERSION,
    }
    stored = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    exported |= dict.fromkeys(keys, stored)
    if model_format == "a2d-qwen3":
        auto_map = {"AutoConfig": "configuration_a2d_qwen3.A2DQwen3Config"}
        for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
            auto_map[name] = "modeling_a2d_qwen3.A2DQwen3LMHeadModel"
        exported |= {
            "model_type": "a2d-qwen3",
            "architectures": ["A2DQwen3LMHeadModel"],
            "auto_map": auto_map,
        }
    return exported


def copy_code(target: Path) -> None:
    """Put the code of an ``a2d-qwen3`` export into ``target``."""
    for file in CODE_FILES:
        shutil.copyfile(file, target / file.name)


def has_our_code(directory: Path) -> bool:
    """True if the Python files of an export are, byte for byte, those that this version writes."""
    expected = {file.name: file.read_bytes() for file in CODE_FILES}
    return {file.name: file.read_bytes() for file in directory.glob("*.py")} == expected


def as_ranges(ids: Sequence[int]) -> list[list[int]]:
    """Rising ids -> [first, stop) ranges: ``[3, 4, 7] -> [[3, 5], [7, 8]]``."""
    ranges: list[list[int]] = []
    for value in ids:
        if ranges and ranges[-1][1] == value:
            ranges[-1][1] += 1
        else:
            ranges.append([value, value + 1])
    return ranges


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as Hugging Face formats it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
