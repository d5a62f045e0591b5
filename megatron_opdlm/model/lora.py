"""Low-rank adaptation (Hu et al., arXiv 2106.09685) beside Megatron's tensor-parallel linears.

A linear y = W x becomes y = W x + s B A x with s = alpha / rank, A [rank, in], B [out, rank]; W and
all else is frozen. B starts at zero, so a run starts at the pretrained model. Where W's rows are
split over tensor ranks so are B's and A is whole on every rank; where its columns are, so are A's
and B is whole. The term is added by a hook: the linears and the names of their weights stay as they
are, and without adapters nothing here runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.configuration.models import LORA_TARGETS
from megatron_opdlm.diffusion.randomness import INITIALISE, uniform
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model_files.manifest import LowRank

NAME = "adapters"  # of the module that a model holds its low-rank terms in
_SPLIT_BY_COLUMNS = ("linear_proj", "linear_fc2")


class Adapter(torch.nn.Module):
    """The term s B A x of one linear, on this tensor rank.

    What travels between the ranks has ``rank`` features a token, not the hidden size.
    """

    def __init__(self, linear: Any, target: str, low_rank: LowRank) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        options: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.target, self.scale = target, low_rank.scale
        self.splits_columns = target in _SPLIT_BY_COLUMNS
        self.sequence_parallel = bool(linear.config.sequence_parallel)
        self.a = torch.nn.Parameter(torch.empty(low_rank.rank, columns, **options))
        self.b = torch.nn.Parameter(torch.zeros(rows, low_rank.rank, **options))
        split, whole = (self.a, self.b) if self.splits_columns else (self.b, self.a)
        # A split factor has parts of the gradient norm on every tensor rank, a whole one counts
        # once.
        set_tensor_model_parallel_attributes(split, True, 1 if self.splits_columns else 0, 1)
        # Under sequence parallelism a rank sees its tokens only: Megatron sums gradients with this
        # mark over the tensor ranks. Otherwise they are complete, and equal, on all of them.
        vars(whole)["sequence_parallel"] = self.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x as the linear takes it -> the term, split as the linear's output.

        Gradients: each region function's backward is the transpose of its forward, so the gradient
        of A x is summed over the tensor ranks (columns of B) or given to all of them.
        """
        reduced = F.linear(x, self.a)
        if self.splits_columns and self.sequence_parallel:
            reduced = reduce_scatter_to_sequence_parallel_region(reduced)
        elif self.splits_columns:
            reduced = reduce_from_tensor_model_parallel_region(reduced)
        elif self.sequence_parallel:
            reduced = gather_from_sequence_parallel_region(
                reduced, tensor_parallel_output_grad=True
            )
        else:
            reduced = copy_to_tensor_model_parallel_region(reduced)
        return F.linear(reduced, self.b) * self.scale

    @torch.no_grad()
    def initialise(self, seed: int, layer: int) -> None:
        """B = 0; A uniform in +-1 / sqrt(in), each value a function of (seed, global layer, target,
        row, column), whatever the layout.
        """
        columns = self.a.shape[1]
        first, whole = 0, columns
        if self.splits_columns:
            first = columns * parallel_state.get_tensor_model_parallel_rank()
            whole = columns * parallel_state.get_tensor_model_parallel_world_size()
        row, column = torch.arange(len(self.a))[:, None], torch.arange(first, first + columns)
        drawn = uniform(seed, INITIALISE, layer, LORA_TARGETS.index(self.target), row, column)
        self.a.copy_((2 * drawn - 1) * whole**-0.5)
        self.b.zero_()

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """As Megatron saves the linear's weight: fc1 joins [gate; up] of every rank."""
        tensors = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            prefix,
            {"a": 1} if self.splits_columns else {"b": 0},
            sharded_offsets,
            tp_group=parallel.tensor_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.target == "linear_fc1":
            key = f"{prefix}b"
            tensors[key] = apply_swiglu_sharded_factory(tensors[key], sharded_offsets)
        return tensors


class Adapters(torch.nn.Module):
    """All terms of this pipeline stage. ``enabled`` False: the model is its frozen base."""

    def __init__(self, model: LanguageModel, low_rank: LowRank) -> None:
        super().__init__()
        self.low_rank, self.enabled = low_rank, True
        self.numbers = [number - 1 for number in model.layer_numbers]  # global, from 0
        self.total = model.config.num_layers
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {t: Adapter(_linear(layer, t), t, low_rank) for t in low_rank.targets}
            )
            for layer in model.decoder.layers
        )
        self._hooks = [
            linear.register_forward_hook(self._hook(adapter))
            for linear, adapter in self.pairs(model)
        ]

    def pairs(self, model: LanguageModel) -> Iterator[tuple[Any, Adapter]]:
        """(linear, its term) of every adapted linear."""
        for layer, adapters in zip(model.decoder.layers, self.layers, strict=True):
            assert isinstance(adapters, torch.nn.ModuleDict)
            for target, adapter in adapters.items():
                assert isinstance(adapter, Adapter)
                yield _linear(layer, target), adapter

    def _hook(self, adapter: Adapter) -> Any:
        def add_term(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
            if not self.enabled:
                return None
            y, bias = output
            return y + adapter(_normed(linear, inputs[0])), bias

        return add_term

    def unhook(self) -> None:
        """Leave the linears as they were found."""
        for hook in self._hooks:
            hook.remove()

    def named_terms(self) -> Iterator[tuple[int, str, Adapter]]:
        """(global layer from 0, target, term)."""
        for number, adapters in zip(self.numbers, self.layers, strict=True):
            assert isinstance(adapters, torch.nn.ModuleDict)
            for target, adapter in adapters.items():
                assert isinstance(adapter, Adapter)
                yield number, target, adapter

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Stacked over the layers, as Megatron saves a model's: ``adapters.linear_qkv.a`` is
        [L, rank, in], readable at any layout.
        """
        assert metadata is not None and not sharded_offsets
        state = {}
        for number, target, adapter in self.named_terms():
            offsets = ((0, number, self.total),)
            own = adapter.sharded_state_dict(f"{prefix}{target}.", offsets, metadata)
            local = f"{prefix}layers.{number - self.numbers[0]}.{target}."
            state |= {local + key.rpartition(".")[2]: tensor for key, tensor in own.items()}
        return state


def _linear(layer: Any, target: str) -> Any:
    owner = layer.mlp if "fc" in target else layer.self_attention
    return getattr(owner, target)


def _normed(linear: Any, x: Tensor) -> Tensor:
    """What the linear's weight is multiplied with: Transformer Engine's may hold the norm before
    it, and does not hand its result out.
    """
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), linear.eps).to(x.dtype)


def adapters_of(model: LanguageModel) -> Adapters | None:
    """A model's low-rank terms, None where it has none."""
    found = model._modules.get(NAME)
    assert found is None or isinstance(found, Adapters)
    return found


def attach(model: LanguageModel, low_rank: LowRank, *, seed: int) -> None:
    """Give a model fresh low-rank terms, which change nothing yet."""
    adapters = Adapters(model, low_rank)
    for number, _, adapter in adapters.named_terms():
        adapter.initialise(seed, number)
    model.add_module(NAME, adapters)


def freeze_base(model: LanguageModel) -> None:
    """Train the low-rank terms only. To be called before Megatron's wrapper for gradients, so that
    neither gradients nor optimizer state of the frozen weights exist.
    """
    adapters = adapters_of(model)
    assert adapters is not None
    model.requires_grad_(False)
    adapters.requires_grad_(True)
    if model.config.recompute_granularity is not None and model.pre_process:
        model.embedding.register_forward_hook(_require_gradient)


def _require_gradient(embedding: Any, inputs: Any, output: Tensor) -> None:
    """Megatron's recomputation, of a layer or its MLP, is differentiated only where its input is,
    and the first layer's comes from a frozen embedding.
    """
    if torch.is_grad_enabled():
        output.requires_grad_()


@torch.no_grad()
def merge(model: LanguageModel) -> None:
    """Add the low-rank terms to the weights and take them away."""
    adapters = adapters_of(model)
    assert adapters is not None
    for linear, adapter in adapters.pairs(model):
        linear.weight.copy_(merged(linear.weight, adapter.a, adapter.b, adapter.scale))
    adapters.unhook()
    del model._modules[NAME]


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A, rounded once to the type of W. Summed in float64: in float32 the sum over the rank
    would round differently for a part of the rows than for all of them.
    """
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)


@contextmanager
def base_only(model: LanguageModel) -> Iterator[LanguageModel]:
    """The frozen base that low-rank terms stand beside; a model without them is its own base."""
    adapters, training = adapters_of(model), model.training
    if adapters is None:
        yield model
        return
    adapters.enabled = False
    model.eval()  # recomputation is for training only
    try:
        yield model
    finally:
        adapters.enabled = True
        model.train(training)
