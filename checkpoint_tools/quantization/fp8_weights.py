"""The weights of a quantised export, as ModelOpt's checkpoints have them and engines read them.

A linear of a layer is ``X.weight`` (E4M3), ``X.weight_scale`` and ``X.input_scale`` (float32
scalars): its value is ``weight * weight_scale``, and its inputs are divided by ``input_scale``
before they are rounded to E4M3. Linears that engines join (query, key and value; gate and up) have
the same scales. Embedding, norms and output layer are stored as in any export.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_tools.streaming.megatron_weights import DTYPES
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.names import (
    FC1,
    FC2,
    PROJ,
    QKV,
    hf_parts,
    megatron_from_hf,
    megatron_names,
    sources,
    split_layer,
)
from megatron_opdlm.model_files.safetensors_dir import INDEX, SINGLE
from megatron_opdlm.model_files.shape import ModelShape, hf_names, read_json

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
_STORED = {"F8_E4M3": FP8, "F32": torch.float32, "BF16": torch.bfloat16}

Scales = Mapping[str, tuple[Tensor, Tensor]]  # Megatron name -> scale of the weight, of the inputs


def is_linear(name: str) -> bool:
    """Whether a Megatron parameter is a linear of a (dense) layer: those are quantised."""
    return name.startswith("decoder.layers.") and split_layer(name)[1] in (QKV, PROJ, FC1, FC2)


def quantized_names(shape: ModelShape) -> dict[str, str]:
    """Hugging Face name of each quantised weight -> the Megatron parameter that it is a part of."""
    return {
        source: name
        for name in megatron_names(shape)
        if is_linear(name)
        for source in sources(name, shape)
    }


def scale_name(weight: str, of: str) -> str:
    """``of``: "weight" | "input"."""
    return f"{weight.removesuffix('.weight')}.{of}_scale"


def to_fp8(tensor: Tensor, scale: Tensor) -> Tensor:
    """The nearest E4M3 numbers of ``tensor / scale``, in float32; what is larger becomes 448."""
    return (tensor.float() / scale.to(tensor.device)).clamp(-LARGEST, LARGEST).to(FP8)


def write_fp8(
    directory: Path,
    shape: ModelShape,
    get: Callable[[str], Tensor],
    scales: Scales,
    dtype: str,
    shard_bytes: int,
) -> None:
    """Write all weights of ``shape``; ``get`` reads a global Megatron tensor, ``dtype`` is that of
    what is not quantised. A shard exceeds ``shard_bytes`` for one linear only.
    """
    shards = _Shards(directory, shard_bytes)
    for name in megatron_names(shape):
        for source, part in hf_parts(name, shape, get(name)):
            rounded = part.to(DTYPES[dtype])
            if name not in scales:
                shards.add({source: rounded})
                continue
            weight, inputs = scales[name]
            shards.add(
                {
                    source: to_fp8(rounded, weight),
                    scale_name(source, "weight"): weight,
                    scale_name(source, "input"): inputs,
                }
            )
    shards.close()


class _Shards:
    """Safetensors files that are filled one after the other, and numbered when all are there."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._limit = directory, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._total = 0  # bytes

    def add(self, tensors: dict[str, Tensor]) -> None:
        def size(of: dict[str, Tensor]) -> int:
            return sum(t.nbytes for t in of.values())

        if self._waiting and size(self._waiting) + size(tensors) > self._limit:
            self._flush()
        # Copies: a tied head is the embedding itself, and the checkpoint's files are mapped.
        self._waiting |= {
            name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
        }
        self._total += size(tensors)

    def _flush(self) -> None:
        save_file(self._waiting, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._waiting))
        self._waiting = {}

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"

    def close(self) -> None:
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._directory / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class Fp8Weights:
    """The tensors of a quantised export, checked by name, type and size, read one at a time."""

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        """Raises InputError where a file is missing or broken, or a tensor is not as it must be."""
        self.directory, self.shape = directory, shape
        self.quantized = quantized_names(shape)
        self._files: list[Any] = []
        self._where: dict[str, Any] = {}
        self._paths = _files(directory)
        for file in self._paths:
            try:
                opened: Any = safe_open(str(file), framework="pt")
                opened.__enter__()
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} cannot be read ({' '.join(str(error).split())[:120]}); copy it again"
                ) from None
            self._files.append(opened)
            self._where |= dict.fromkeys(opened.keys(), opened)
        self._check()

    def _check(self) -> None:
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            name: (size, ("F8_E4M3",) if name in self.quantized else ("F32", "BF16"))
            for name, size in hf_names(self.shape).items()
        }
        for name in self.quantized:
            expected |= {scale_name(name, of): ((), ("F32",)) for of in ("weight", "input")}
        different = sorted(set(expected) ^ set(self._where))
        if different:
            what = "lacks" if different[0] in expected else "holds"
            raise InputError(
                f"{self.directory} {what} {different[0]} ({len(different)} tensors in all), unlike "
                "a quantised export of its config.json; copy it again, all files"
            )
        for name, (size, kinds) in expected.items():
            found = self._where[name].get_slice(name)
            if tuple(found.get_shape()) != size or found.get_dtype() not in kinds:
                raise InputError(
                    f"{self.directory}: {name} is {found.get_dtype()} {found.get_shape()}, but "
                    f"config.json makes it {' or '.join(kinds)} {list(size)}; export it again"
                )

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._paths

    def stored(self, name: str) -> Tensor:
        """A tensor as it is on disk."""
        return self._where[name].get_tensor(name)

    def scale(self, weight: str, of: str) -> Tensor:
        """Float32 scalar of a quantised weight: "weight" | "input"."""
        return self.stored(scale_name(weight, of))

    def get(self, name: str) -> Tensor:
        """The value of a weight: float32 where it is quantised, else as stored."""
        found = self.stored(name)
        return found.float() * self.scale(name, "weight") if name in self.quantized else found

    def megatron(self, name: str) -> Tensor:
        """The value of a global Megatron parameter."""
        return megatron_from_hf(name, self.shape, self.get, 0, 1, self.shape.vocab_size)

    def input_scale(self, name: str) -> Tensor:
        """Of a Megatron linear. Its parts have the same."""
        return self.scale(sources(name, self.shape)[0], "input")

    def close(self) -> None:
        for opened in self._files:
            opened.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise InputError(f"{directory / INDEX} has no valid weight_map; copy the file again")
    return [directory / file for file in sorted(set(weight_map.values()))]


def compare_fp8(weights: Fp8Weights, get: Callable[[str], Tensor], dtype: str) -> str:
    """Hold a quantised export against the checkpoint that it was made from: every scale of a weight
    is amax / 448 of what engines join, every E4M3 number the nearest, everything else bit-equal.

    ``get`` reads a global Megatron tensor, ``dtype`` is that of the export. Raises RunError with
    the first tensor that differs.
    """
    for name in megatron_names(weights.shape):
        whole = get(name).to(DTYPES[dtype])
        amax = whole.float().abs().max()
        for source, part in hf_parts(name, weights.shape, whole):
            stored = weights.stored(source)
            if source in weights.quantized:
                scale = weights.scale(source, "weight")
                inputs = weights.scale(source, "input")
                exact = torch.allclose(scale * LARGEST, amax, rtol=1e-6, atol=0.0)
                exact = exact and bool(inputs > 0) and bool(inputs.isfinite())
                exact = exact and torch.equal(stored.float(), to_fp8(part, scale).float())
            else:
                exact = torch.equal(stored, part.to(stored.dtype))
            if not exact:
                raise RunError(
                    f"{source} of {weights.directory} is not what the checkpoint's weights are "
                    "quantised to; export it again"
                )
    return f"{len(weights.quantized)} linears are the nearest FP8 numbers, the others bit-equal"
