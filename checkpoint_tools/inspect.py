"""Says what a model directory holds (Hugging Face or Megatron checkpoint), complete or not.

Reads headers and file sizes only. Exit code 2 when the directory is incomplete or no model.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from checkpoint_tools.quantization.export import is_quantized, read_record
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.huggingface_files import CONTRACT_KEYS
from megatron_opdlm.model_files.manifest import HUGGINGFACE, is_checkpoint, read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import ModelShape, read_json, read_shape


def main() -> None:
    """Print one ``name: value`` line for each fact."""
    parser = Arguments(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give a model directory")
    facts = megatron_facts(directory) if is_checkpoint(directory) else hf_facts(directory)
    try:
        for name, value in facts:
            print(f"{name}: {value}")
    except InputError:
        print("complete: no", flush=True)
        raise
    print("complete: yes")


def hf_facts(directory: Path) -> Iterator[tuple[str, str]]:
    """Facts of a Hugging Face directory. Raises InputError at the first that is wrong."""
    config = read_json(directory / "config.json")
    yield "kind", f"Hugging Face directory, model_type {config.get('model_type')}"
    quantized = is_quantized(directory)
    shape = read_shape(directory, allow_quantized=quantized)
    yield from shape_facts(shape)
    yield from _quantized_facts(directory, shape) if quantized else _weight_facts(directory, shape)
    contract = {key: config[key] for key in CONTRACT_KEYS if key in config}
    yield "block contract", json.dumps(contract) if contract else "none recorded"


def _weight_facts(directory: Path, shape: ModelShape) -> Iterator[tuple[str, str]]:
    with open_weights(directory, shape) as weights:
        yield "dtype", weights.stored_dtype()
        yield from _files(weights.files())


def _quantized_facts(directory: Path, shape: ModelShape) -> Iterator[tuple[str, str]]:
    """Of an export with ``--quantize``; a directory that others quantised is refused."""
    from checkpoint_tools.quantization.fp8_weights import Fp8Weights

    record = read_record(directory)
    with Fp8Weights(directory, shape) as weights:
        others = record["unquantized_dtype"]
        yield "dtype", f"fp8 in {len(weights.quantized)} linears, {others} elsewhere"
        yield from _files(weights.files())


def megatron_facts(directory: Path) -> Iterator[tuple[str, str]]:
    """Facts of a Megatron checkpoint. Raises InputError when its save was cut short."""
    yield "kind", "Megatron checkpoint"
    manifest = read_manifest(directory)
    yield "content", {"model": "weights", "training": "weights and optimizer"}[manifest.kind]
    yield from shape_facts(read_shape(directory / HUGGINGFACE))
    yield "dtype", manifest.dtype
    if manifest.low_rank is not None:
        terms = manifest.low_rank
        where = ", ".join(terms.targets)
        yield "low-rank terms", f"rank {terms.rank}, alpha {terms.alpha:g}, beside {where}"
    yield "files", f"{len(manifest.files)}, {sum(manifest.files.values()):,} bytes"
    yield "block contract", json.dumps(asdict(manifest.block_contract))
    yield "step", "never trained" if manifest.step is None else str(manifest.step)
    if (directory / "state.json").is_file():
        state = read_json(directory / "state.json")
        yield "trained tokens", f"{state.get('cumulative_trained_tokens', 0):,}"


def shape_facts(shape: ModelShape) -> Iterator[tuple[str, str]]:
    """The model's sizes."""
    yield "parameters", f"{shape.parameters:,}"
    feed_forward = f"ffn {shape.ffn}"
    if shape.experts is not None:
        yield "parameters that work on a token", f"{shape.active_parameters:,}"
        e = shape.experts
        feed_forward = f"{e.per_token} of {e.count} experts of ffn {e.ffn}"
    yield (
        "shape",
        f"{shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads in {shape.groups} "
        f"groups of size {shape.head_dim}, {feed_forward}, vocabulary {shape.vocab_size}, "
        f"{'tied' if shape.tied else 'untied'} embeddings",
    )
    yield "positions", f"{shape.max_positions}, rope_theta {shape.rope_theta:g}"


def _files(files: list[Path]) -> Iterator[tuple[str, str]]:
    total = sum(file.stat().st_size for file in files)
    yield "weight files", f"{len(files)}, {total:,} bytes"


if __name__ == "__main__":
    command(main)
