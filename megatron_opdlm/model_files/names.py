"""A model's weights under their two names: Hugging Face's and Megatron-Core's. No Megatron import.

Megatron keeps the query, key and value projections in one matrix, per key/value group
``[q heads of the group; k; v]``, and the two halves of the gated MLP as ``[gate; up]``, where every
tensor-parallel rank has its own part of each. The experts of a layer are named by their number in
the model, ``decoder.layers.3.mlp.experts.17.linear_fc1.weight``, however Megatron keeps them
(``split_expert`` takes the number out). Only data moves here: every function keeps the bits.
Sizes below: H hidden, A query heads, G groups (key/value heads), D head size.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_opdlm.model_files.families import (
    EXPERT_FC1,
    EXPERT_FC2,
    EXPERT_SOURCES,
    FAMILIES,
    FC1,
    FC2,
    PROJ,
    QKV,
    QKV_BIAS,
)
from megatron_opdlm.model_files.shape import (
    Experts,
    ModelShape,
    check_layout,
    hf_names,
    padded_vocab,
    read_shape,
)

__all__ = [
    "FC1",
    "FC2",
    "PROJ",
    "QKV",
    "QKV_BIAS",
    "Experts",
    "ModelShape",
    "check_layout",
    "hf_from_megatron",
    "hf_names",
    "hf_parts",
    "megatron_from_hf",
    "megatron_names",
    "padded_vocab",
    "read_shape",
    "sources",
    "split_expert",
    "split_layer",
]

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
_PARAMETERS = {name for family in FAMILIES for name in family.layer_sources}
# Transformer Engine fuses these norms into the next linear; checkpoints of either spec say so.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
SPLIT_COLUMNS = (PROJ, FC2, EXPERT_FC2)  # row-parallel linears: a rank holds columns of the matrix


def megatron_names(shape: ModelShape) -> list[str]:
    """Every Megatron parameter by global layer and expert number; ``output_layer.weight`` only if
    untied.
    """
    names = [*shape.family.layer_sources]
    if shape.experts is not None:
        for expert in range(shape.experts.count):
            names += [_numbered(name, expert) for name in EXPERT_SOURCES]
    layers = [f"decoder.layers.{i}.{name}" for i in range(shape.layers) for name in names]
    return [EMBEDDING, *layers, FINAL_NORM] + ([] if shape.tied else [OUTPUT])


def sources(name: str, shape: ModelShape) -> tuple[str, ...]:
    """The Hugging Face tensors that a Megatron parameter is made of: reading can be lazy."""
    if name == EMBEDDING or (name == OUTPUT and shape.tied):
        return ("model.embed_tokens.weight",)
    if name == OUTPUT:
        return ("lm_head.weight",)
    if name == FINAL_NORM:
        return ("model.norm.weight",)
    layer, attribute = split_layer(name)
    expert, plain = split_expert(attribute)
    table = shape.family.layer_sources if expert is None else EXPERT_SOURCES
    return tuple(f"model.layers.{layer}.{source.format(expert)}" for source in table[plain])


def split_layer(name: str) -> tuple[int, str]:
    """``decoder.layers.3.mlp.linear_fc1.weight`` -> ``(3, "mlp.linear_fc1.weight")``.

    Fused norms come back under their plain names; experts keep their number.
    """
    prefix, _, rest = name.partition("decoder.layers.")
    number, _, attribute = rest.partition(".")
    attribute = FUSED_NORMS.get(attribute, attribute)
    expert, plain = split_expert(attribute)
    known = EXPERT_SOURCES if expert is not None else _PARAMETERS
    if prefix or not number.isdigit() or plain not in known:
        raise KeyError(f"{name} is no parameter of a GPTModel of any family")
    return int(number), attribute


def split_expert(attribute: str) -> tuple[int | None, str]:
    """``mlp.experts.17.linear_fc1.weight`` -> ``(17, "mlp.experts.linear_fc1.weight")``; None for
    what is no expert's.
    """
    prefix, _, rest = attribute.partition("mlp.experts.")
    number, _, tail = rest.partition(".")
    if prefix or not number.isdigit():
        return None, attribute
    return int(number), f"mlp.experts.{tail}"


def _numbered(attribute: str, expert: int) -> str:
    return attribute.replace("mlp.experts.", f"mlp.experts.{expert}.")


def megatron_from_hf(
    name: str,
    shape: ModelShape,
    get: Callable[[str], Tensor],
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
) -> Tensor:
    """This tensor-parallel rank's part of one Megatron parameter.

    ``name`` carries the global layer and expert number; ``get`` reads a whole Hugging Face tensor
    and is called once for each of ``sources(name, shape)``. Rows of the vocabulary's padding are
    zero.
    """
    tensors = [get(source) for source in sources(name, shape)]
    if name in (EMBEDDING, OUTPUT):
        padding = tensors[0].new_zeros(padded_vocab - shape.vocab_size, shape.hidden)
        return _part(torch.cat([tensors[0], padding]), tp_rank, tp_size)
    if name == FINAL_NORM:
        return tensors[0].contiguous()
    _, attribute = split_expert(split_layer(name)[1])
    if attribute in (QKV, QKV_BIAS):
        query, key, value = tensors
        return _part(_join_groups(query, key, value, shape), tp_rank, tp_size).flatten(0, 1)
    if attribute in (FC1, EXPERT_FC1):
        return torch.cat([_part(half, tp_rank, tp_size) for half in tensors])
    if attribute in SPLIT_COLUMNS:
        return _part(tensors[0], tp_rank, tp_size, dim=1)
    return tensors[0].contiguous()  # norms and routers are whole on every rank


def hf_from_megatron(
    shape: ModelShape, get: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor from *global* Megatron tensors (all ranks' parts joined).

    ``get`` returns the tensor of a Megatron name with its global numbers; it is called lazily.
    """
    for name in megatron_names(shape):
        yield from hf_parts(name, shape, get(name))


def hf_parts(name: str, shape: ModelShape, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that one *global* Megatron tensor is made of, in their order."""
    if name in (EMBEDDING, OUTPUT):
        parts: tuple[Tensor, ...] = (tensor[: shape.vocab_size],)
    elif name.endswith((QKV, QKV_BIAS)):
        parts = _split_groups(tensor, shape)
    elif name.endswith("linear_fc1.weight"):
        parts = tensor.chunk(2)
    else:
        parts = (tensor,)
    for source, part in zip(sources(name, shape), parts, strict=True):
        yield source, part.contiguous()


def _join_groups(query: Tensor, key: Tensor, value: Tensor, shape: ModelShape) -> Tensor:
    """[A D, H], [G D, H], [G D, H] -> [G, (A/G + 2) D, H]; biases have no H."""
    per_group = [t.unflatten(0, (shape.groups, -1)) for t in (query, key, value)]
    return torch.cat(per_group, dim=1)


def _split_groups(qkv: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """[G (A/G + 2) D, H] -> [A D, H], [G D, H], [G D, H]; biases have no H."""
    query_rows = shape.heads // shape.groups * shape.head_dim
    parts = qkv.unflatten(0, (shape.groups, -1)).split(
        [query_rows, shape.head_dim, shape.head_dim], dim=1
    )
    return tuple(part.flatten(0, 1) for part in parts)


def _part(tensor: Tensor, rank: int, size: int, dim: int = 0) -> Tensor:
    """The ``rank``-th of ``size`` equal parts along ``dim``."""
    assert tensor.shape[dim] % size == 0, (tensor.shape, dim, size)
    return tensor.chunk(size, dim)[rank].contiguous()
