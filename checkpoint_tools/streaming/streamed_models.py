"""The two implementations that ``verify`` compares, with one layer's weights in memory at a time.

Both are built without memory for their weights (on the meta device). Before a layer runs, its
weights are read from the files and converted to float32, in the memory that those of the layer
before had: fresh memory costs more time than the conversion. So a forward costs one pass over the
files and the memory of one layer; of our model the embedding and the output layer stay, and of
transformers' the output layer, while of the embedding only the rows that are looked up are read.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_tools.streaming.megatron_weights import DTYPES
from checkpoint_tools.streaming.shared_loading import SharedLoading
from megatron_opdlm import parallel
from megatron_opdlm.errors import RunError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model.weights import named_global_parameters
from megatron_opdlm.model_files.names import EMBEDDING, OUTPUT
from megatron_opdlm.model_files.safetensors_dir import EMBEDDING as HF_EMBEDDING
from megatron_opdlm.model_files.safetensors_dir import HFWeights
from megatron_opdlm.model_files.shape import ModelShape

Loader = Callable[[], Tensor]  # the tensor as it is stored
Listener = Callable[[int], object]  # told the bytes of each tensor that a pass reads


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How stored values become those that are computed with."""

    narrow: str  # "bf16" | "fp32": both sides are rounded to the narrower of their stored types
    device: torch.device

    def __call__(self, stored: Tensor, memory: Tensor | None = None) -> Tensor:
        """In ``memory`` of the same shape or in new one; ``stored`` itself if nothing changes."""
        rounded = stored.to(DTYPES[self.narrow])
        if rounded.dtype is torch.float32 and rounded.device == self.device:
            return rounded
        if memory is None:
            memory = torch.empty(stored.shape, dtype=torch.float32, device=self.device)
        return memory.copy_(rounded)


class WeightStream:
    """Fills each part of a model when it is about to run, and empties the one before."""

    def __init__(
        self,
        parts: Sequence[tuple[nn.Module, Mapping[str, Loader]]],
        precision: Precision,
        listener: Listener,
    ) -> None:
        """``parts``: modules in the order in which they run, each with the loaders of its
        parameters by their names inside the module.
        """
        self.loading = SharedLoading()
        self._precision, self._listener = precision, listener
        self._memory: dict[tuple[str, torch.Size], Tensor] = {}  # by name in a part, and shape
        # What lies there, and its bytes in the file.
        self._source: dict[tuple[str, torch.Size], tuple[Loader, int]] = {}
        self._filled: tuple[nn.Module, dict[str, Any]] | None = None
        for module, loaders in parts:
            module.register_forward_pre_hook(self._hook(module, loaders))

    def _hook(self, module: nn.Module, loaders: Mapping[str, Loader]) -> Callable[..., None]:
        def bring(*_: Any) -> None:
            self.loading.arrive(lambda: self._fill(module, loaders))

        return bring

    def _fill(self, module: nn.Module, loaders: Mapping[str, Loader]) -> None:
        if self._filled is not None:
            _set(*self._filled)
        self._filled = module, {name: module.get_parameter(name) for name in loaders}
        for name, load in loaders.items():  # one by one: the stored tensor goes before the next
            _set(module, {name: self._loaded(name, module.get_parameter(name).shape, load)})

    @torch.inference_mode(False)  # whatever mode the next pass runs in, it may write there, too
    def _loaded(self, name: str, size: torch.Size, load: Loader) -> Tensor:
        key = name, size
        source, size_in_file = self._source.get(key, (None, 0))
        if source is load:  # there since the pass before
            self._listener(size_in_file)
            return self._memory[key]
        stored = load()
        self._listener(stored.nbytes)
        if stored.shape != size:
            raise RunError(f"{name} is not of shape {tuple(size)}, but {tuple(stored.shape)}")
        value = self._precision(stored, self._memory.get(key))
        if value is not stored:
            self._memory[key], self._source[key] = value, (load, stored.nbytes)
        return value


class _StoredRows(nn.Module):
    """An embedding that stays in its file; the rows that are looked up are converted."""

    def __init__(self, stored: Tensor, precision: Precision) -> None:
        super().__init__()
        self._stored, self._precision = stored, precision

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]"""
        return self._precision(nn.functional.embedding(ids.cpu(), self._stored))


def _set(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        expected = holder._parameters[leaf]
        if expected is None or expected.shape != value.shape:
            raise RunError(f"{name} of {type(module).__name__} is not of shape {value.shape}")
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        holder._parameters[leaf] = value


def streamed_megatron(
    shape: ModelShape,
    get: Callable[[str], Tensor],
    narrow: str,
    name: str,
    listener: Listener = lambda _: None,
) -> LanguageModel:
    """The checkpoint's GPTModel in float32; ``get`` reads a tensor by its global Megatron name."""
    hardware = parallel.init(parallel.Layout())
    precision = Precision(narrow=narrow, device=hardware.device)
    options = {**hardware.transformer_options, "use_cpu_initialization": True}
    nowhere = dataclasses.replace(
        hardware, device=torch.device("meta"), transformer_options=options
    )
    with torch.device("meta"):
        model = build_model(shape, parallel.Layout(), torch.float32, nowhere, name=name)
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    layers: list[dict[str, Loader]] = [{} for _ in model.decoder.layers]
    for global_name, parameter in named_global_parameters(model):
        path = paths[id(parameter)]
        rows = shape.vocab_size if global_name in (EMBEDDING, OUTPUT) else None

        def load(global_name: str = global_name, rows: int | None = rows) -> Tensor:
            return get(global_name)[:rows]

        if path.startswith("decoder.layers."):
            number, _, inside = path.removeprefix("decoder.layers.").partition(".")
            layers[int(number)][inside] = load
        else:
            _set(model, {path: precision(load())})
    WeightStream(list(zip(model.decoder.layers, layers, strict=True)), precision, listener)
    return model.requires_grad_(False).eval()


def streamed_transformers(
    model_class: Any, config: Any, weights: HFWeights, narrow: str, listener: Listener
) -> tuple[Any, SharedLoading]:
    """A causal language model of transformers in float32, and where its runs meet."""
    precision = Precision(narrow=narrow, device=select_hardware().device)
    with torch.device("meta"):
        model = model_class(config).to(torch.float32)
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config=config).to(precision.device)
    inner.embed_tokens = _StoredRows(weights.get(HF_EMBEDDING), precision)
    parts = []
    for prefix, module in (
        *((f"model.layers.{number}.", layer) for number, layer in enumerate(inner.layers)),
        ("model.norm.", inner.norm),
        ("lm_head.", model.lm_head),
    ):
        loaders = {
            name: _loader(prefix + name, parameter.shape, weights)
            for name, parameter in module.named_parameters()
        }
        parts.append((module, loaders))
    stream = WeightStream(parts, precision, listener)
    return model.requires_grad_(False).eval(), stream.loading


def _loader(name: str, size: torch.Size, weights: HFWeights) -> Loader:
    """Reads a parameter of transformers from the files, where experts are stored one by one."""
    if name == "lm_head.weight" and weights.model_shape.tied:
        name = HF_EMBEDDING
    if name in weights.names():
        return lambda: weights.get(name)
    prefix, _, joined = name.rpartition(".")
    kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(joined)
    if kinds is None or not prefix.endswith(".experts"):
        raise RunError(f"{weights.directory} holds nothing for transformers' {name}")

    def load() -> Tensor:
        """Transformers 5 keeps all experts of a layer in one tensor [E, rows, columns]."""
        together: Tensor | None = None
        for expert in range(size[0]):
            parts = [weights.get(f"{prefix}.{expert}.{kind}.weight") for kind in kinds]
            if together is None:
                together = torch.empty(size, dtype=parts[0].dtype)
            torch.cat(parts, out=together[expert])
        assert together is not None
        return together

    return load
