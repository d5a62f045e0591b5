"""Weights of a Megatron checkpoint directory, read without Megatron and without building a model.

Tensors lie under the key prefix ``model.``; those of layers are stacked, so a key holds [L, ...],
and those of experts [L, E, ...]. Each is read when it is asked for, one layer's part at a time. A
training checkpoint holds the optimizer under other keys, which are not read here.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.streaming.weight_reader import StoredWeights
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import WEIGHTS, read_manifest
from megatron_opdlm.model_files.names import FUSED_NORMS, megatron_names, split_expert, split_layer
from megatron_opdlm.model_files.shape import ModelShape

PREFIX = "model."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED_NORMS = {plain: fused for fused, plain in FUSED_NORMS.items()}


def read_weights(directory: Path, shape: ModelShape) -> Callable[[str], Tensor]:
    """Open a checkpoint's weights in this one process; returns ``get`` for ``hf_from_megatron``,
    which reads one global tensor. What it returns may lie in a mapped file: writing to it changes
    nothing but that tensor. Low-rank terms are merged into the weights that they stand beside.

    Raises InputError when the save was cut short or a tensor is missing.
    """
    low_rank = read_manifest(directory).low_rank
    stored = StoredWeights(directory / WEIGHTS)
    missing = [name for name in megatron_names(shape) if stored_key(name)[0] not in stored]
    if missing:
        raise InputError(
            f"{directory}/weights lacks {missing[0]} ({len(missing)} tensors in all); it does "
            "not belong to its huggingface/config.json: import the model again"
        )

    def get(name: str) -> Tensor:
        key, indices = stored_key(name)
        weight = stored.read(key, indices)
        target, kind = name.split(".")[-2:]
        adapted = low_rank is not None and target in low_rank.targets and kind == "weight"
        if low_rank is None or not adapted:
            return weight
        from megatron_opdlm.model.lora import NAME, merged

        a, b = (stored.read(f"{PREFIX}{NAME}.{target}.{factor}", indices) for factor in "ab")
        return merged(weight, a, b, low_rank.scale)

    return get


def weight_files(directory: Path) -> list[str]:
    """The checkpoint's files that weights are read from, as its manifest names them; those of the
    optimizer alone are not among them.
    """
    stored = StoredWeights(directory / WEIGHTS)
    return [f"weights/{name}" for name in stored.files(PREFIX)]


def stored_key(name: str) -> tuple[str, tuple[int, ...]]:
    """Key of a Megatron parameter (global numbers) in the checkpoint, and where it lies in what is
    stacked there: nowhere, (layer,) or (layer, expert).

    ``decoder.layers.3.input_layernorm.weight`` ->
    ``("model.decoder.layers.self_attention.linear_qkv.layer_norm_weight", (3,))``
    ``decoder.layers.3.mlp.experts.7.linear_fc1.weight`` ->
    ``("model.decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 7))``
    """
    if not name.startswith("decoder.layers."):
        return PREFIX + name, ()
    layer, attribute = split_layer(name)
    expert, attribute = split_expert(attribute)
    indices = (layer,) if expert is None else (layer, expert)
    if expert is not None:
        attribute = attribute.replace("mlp.experts.", "mlp.experts.experts.")
    return f"{PREFIX}decoder.layers.{_STORED_NORMS.get(attribute, attribute)}", indices
