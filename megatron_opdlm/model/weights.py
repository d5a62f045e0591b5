"""A model's weights under their names in the whole model, filled from Hugging Face tensors."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_opdlm.model import lora
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model_files import names
from megatron_opdlm.model_files.safetensors_dir import open_weights


def named_global_parameters(model: LanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model, parameter) of this rank's part, but for low-rank terms."""
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{lora.NAME}."):
            yield global_name(model, name), parameter


def global_name(model: LanguageModel, name: str) -> str:
    """Name of a parameter in this rank's model -> its name in the whole model.

    Of Transformer Engine's experts, parameter ``linear_fc1.weight3`` is that of local expert 3.
    """
    prefix, _, rest = name.partition("decoder.layers.")
    if prefix or not rest:
        return name
    number, _, attribute = rest.partition(".")
    if (found := _EXPERT.fullmatch(attribute)) is not None:
        linear, last = found["linear"], found["grouped"]
        local = int(found["one"] if last is None else last)
        attribute = f"mlp.experts.{local + _first_expert(model)}.{linear}.weight"
    full = f"decoder.layers.{int(number) + get_transformer_layer_offset(model.config)}.{attribute}"
    layer, attribute = names.split_layer(full)
    return f"decoder.layers.{layer}.{attribute}"


_EXPERT = re.compile(
    r"mlp\.experts\.(local_experts\.(?P<one>\d+)\.)?(?P<linear>\w+)\.weight(?P<grouped>\d+)?"
)


def _first_expert(model: LanguageModel) -> int:
    """Number in the whole model of this rank's first expert."""
    experts = model.shape.experts
    assert experts is not None
    local = experts.count // parallel_state.get_expert_model_parallel_world_size()
    return local * parallel_state.get_expert_model_parallel_rank()


@torch.no_grad()
def fill(model: LanguageModel, get: Callable[[str], Tensor]) -> None:
    """Fill every parameter of this rank from whole Hugging Face tensors returned by ``get``."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in named_global_parameters(model):
        part = names.megatron_from_hf(
            name, model.shape, get, tensor_rank, tensor_ranks, model.vocab_size
        )
        assert part.shape == parameter.shape, (name, tuple(part.shape), tuple(parameter.shape))
        parameter.copy_(part)


def load_hf(model: LanguageModel, hf_dir: Path) -> None:
    """Fill the model from a Hugging Face directory; each rank reads the tensors that it holds a
    part of.
    """
    with open_weights(hf_dir) as weights:
        fill(model, weights.get)
