"""Weights of a Megatron checkpoint directory, read without building a model.

Tensors lie under the key prefix ``model.``; layers are stacked, so a key holds [L, ...]. A training
checkpoint holds the optimizer under other keys, which are not read here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm import parallel  # makes Megatron usable on this machine, so it comes first

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from checkpoint_tools.manifest import read_manifest
from checkpoint_tools.qwen3_names import FUSED_NORMS, megatron_names, split_layer
from checkpoint_tools.qwen3_shape import Qwen3Shape
from megatron_opdlm.errors import InputError
from megatron_opdlm.model.lora import NAME, merged

PREFIX = "model."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED_NORMS = {plain: fused for fused, plain in FUSED_NORMS.items()}


def read_weights(directory: Path, shape: Qwen3Shape) -> Callable[[str], Tensor]:
    """Read a checkpoint's weights in this one process; returns ``get`` for ``hf_from_megatron``.
    Low-rank terms are merged into the weights that they stand beside.

    Raises InputError when the save was cut short or a tensor is missing.
    """
    low_rank = read_manifest(directory).low_rank
    parallel.init(parallel.Layout())
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(directory / "weights"))
        wanted = {key: tensor for key, tensor in stored.items() if key.startswith(PREFIX)}
        missing = [name for name in megatron_names(shape) if stored_key(name)[0] not in wanted]
        if missing:
            raise InputError(
                f"{directory}/weights lacks {missing[0]} ({len(missing)} tensors in all); it does "
                "not belong to its huggingface/config.json: import the model again"
            )
        tensors: Any = dist_checkpointing.load(wanted, str(directory / "weights"))
    except (CheckpointingException, EOFError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{directory}/weights cannot be read ({reason}); use an earlier checkpoint"
        ) from None

    def get(name: str) -> Tensor:
        key, layer = stored_key(name)
        if layer is None:
            return tensors[key]
        weight, target = tensors[key][layer], name.split(".")[-2]
        if low_rank is None or target not in low_rank.targets:
            return weight
        a, b = (tensors[f"{PREFIX}{NAME}.{target}.{factor}"][layer] for factor in "ab")
        return merged(weight, a, b, low_rank.scale)

    return get


def stored_key(name: str) -> tuple[str, int | None]:
    """Key of a Megatron parameter (global layer number) in the checkpoint, and its row if stacked.

    ``decoder.layers.3.input_layernorm.weight`` ->
    ``("model.decoder.layers.self_attention.linear_qkv.layer_norm_weight", 3)``
    """
    if not name.startswith("decoder.layers."):
        return PREFIX + name, None
    layer, attribute = split_layer(name)
    return f"{PREFIX}decoder.layers.{_STORED_NORMS.get(attribute, attribute)}", layer
