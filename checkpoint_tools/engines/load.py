"""Loads an exported directory as its users do, with transformers and ``trust_remote_code=True``.

Only where all that could run is code that this version wrote itself, byte for byte.
"""

import json
from pathlib import Path
from typing import Any

from checkpoint_tools.export.own_code import foreign_code
from megatron_opdlm.model_files.shape import read_json


def problem_of_loading(directory: Path) -> str:
    """Load configuration, tokenizer and model and decode a block; what went wrong, or nothing.

    A directory with code of others is not loaded, which is then what went wrong.
    """
    foreign = foreign_code(directory)
    if foreign:
        return f"{foreign}; its code was not run"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", output_loading_info=True, trust_remote_code=True
        )
        model, info = loaded
        ids = tokenizer("1 + 1 = ", return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=config.block_size)
    except Exception as error:  # whatever transformers raises is what a user would meet
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    lost = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if lost:
        return f"weights do not fit the model: {', '.join(lost[:3])}"
    written = read_json(directory / "config.json").get("rope_theta")
    if getattr(config, "rope_theta", None) != written:
        return f"the loaded configuration has rope_theta={getattr(config, 'rope_theta', None)}"
    response = made[0, ids.shape[1] :]
    if response.numel() == 0 or bool((response == config.mask_token_id).any()):
        return f"generate returned {json.dumps(response.tolist())}"
    return "" if torch.isfinite(model.lm_head.weight).all() else "the output layer is not finite"
