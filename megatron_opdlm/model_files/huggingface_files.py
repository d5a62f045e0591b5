"""What a Hugging Face directory holds beside its weights: files that travel with a model, and the
block contract that its ``config.json`` may record.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import LAYOUTS
from megatron_opdlm.model_files.manifest import BlockContract

CARRIED = (".json", ".jinja", ".txt", ".model")  # no weights, and no code: an export ships its own
ADDED = "mask_token_added"  # config.json's word for a row that the import has put behind the others
CONTRACT_KEYS = (
    ADDED,
    "block_size",
    "mask_token_id",
    "block_alignment",
    "logit_shift",
    "clean_context",
    "forbidden_ids",
    "trained_block_size",
    "trained_thresholds",
    "exporter_version",
)


def carry_over(hf_dir: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template; no weights, no index, no code."""
    target.mkdir(exist_ok=True)
    for path in sorted(hf_dir.iterdir()):
        if path.is_file() and path.suffix in CARRIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name)


def read_contract(config: Mapping[str, Any], mask_token_id: int | None) -> BlockContract:
    """The block contract that a config.json records; what it leaves out is as SDAR, dllm and the
    paper's models have it.

    Raises InputError for what we cannot honour, whoever wrote it: I-DLM's models, for one, bear the
    names of SDAR's and are causal.
    """
    model_type = config.get("model_type")
    size, alignment = config.get("block_size"), config.get("block_alignment", "absolute")
    shift, context = config.get("logit_shift", False), config.get("clean_context", "block_causal")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"config.json: block_size={size!r} is no positive number; correct it")
    if not isinstance(shift, bool):
        raise InputError(
            f"config.json: logit_shift={shift!r} is neither true nor false; correct it"
        )
    if context != "block_causal":
        raise InputError(
            f"config.json: clean_context={context!r}, but here clean tokens see their whole block "
            "('block_causal'); use a model that was trained so"
        )
    # A plain layout may record how it was trained; the others promise how they are decoded.
    layout = LAYOUTS.get(str(model_type))
    promised = layout is not None and layout.has_code
    if alignment not in (("absolute",) if promised else ("absolute", "response")):
        raise InputError(
            f"config.json: block_alignment={alignment!r}, but blocks are counted from position 0 "
            f"('absolute') in every reader of model_type={model_type!r}; use a model that was "
            "trained so"
        )
    return BlockContract(
        mask_token_id=mask_token_id,
        block_size=size,
        block_alignment=alignment,
        logit_shift=shift,
        clean_context=context,
    )
