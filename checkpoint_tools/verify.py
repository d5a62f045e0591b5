"""Compares a Hugging Face directory with a Megatron checkpoint: weights, logits and decoded tokens.

- weights: every tensor bit for bit, in the narrower of the two stored types;
- logits: transformers' model and our GPTModel on one causal forward, both in float32;
- tokens: where the directory has the project's own ``generate``, its greedy tokens and those of our
  rollout engine, for prompts of every length modulo the block size. What runs are this version's
  own files; where the directory's differ from them, the tokens are not compared.

Of a quantised export only the weights: they are the nearest numbers to the checkpoint's.

An export compares each tensor as it is written, and then logits and a sample of the tokens: two
passes of one block, eight prompts of a small model and two of a large one (``export_hf --verify
full``: all of the above).

The models are read layer by layer, so the memory is that of a layer and of the embedding. Every
denoising pass reads the files once, for all prompts together.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoint_tools.arguments import add_quiet, start_alone
from checkpoint_tools.comparisons import (
    FULL,
    Extent,
    compare_logits,
    compare_tokens,
    compare_weights,
    why_without_tokens,
)
from checkpoint_tools.export.formats import with_explicit_head
from checkpoint_tools.quantization.export import is_quantized, read_record
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.huggingface_files import ADDED
from megatron_opdlm.model_files.manifest import HUGGINGFACE, Manifest, check_contents, read_manifest
from megatron_opdlm.model_files.safetensors_dir import HFWeights, open_weights
from megatron_opdlm.model_files.shape import ModelShape, read_json, read_shape
from megatron_opdlm.reporting.progress import BYTES, Progress, say


def main() -> None:
    """Report each comparison; the first that fails ends the command with exit code 1."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint")
    add_quiet(parser)
    arguments = parser.parse_args()
    start_alone("verify")
    manifest = read_manifest(arguments.checkpoint)
    # What tensors are compared with needs no checksum; a wrong configuration would be trusted.
    small = [name for name in manifest.sha256 if not name.endswith(".distcp")]
    check_contents(arguments.checkpoint, manifest, small)
    pair = arguments.hf, arguments.checkpoint
    for result in compare(*pair, manifest, quiet=arguments.quiet):
        say(result)


def compare(
    hf_dir: Path,
    checkpoint: Path,
    manifest: Manifest,
    extent: Extent = FULL,
    *,
    name: str = "",
    quiet: bool = True,
) -> Iterator[str]:
    """Yield one line for each comparison that held. A quantised export's weights always are.

    Raises RunError at the first that does not, InputError for models of different shapes.
    """
    from checkpoint_tools.streaming.megatron_weights import read_weights
    from checkpoint_tools.streaming.streamed_models import streamed_megatron

    quantized = is_quantized(hf_dir)
    shape = read_shape(hf_dir, allow_quantized=True)
    stored = read_shape(checkpoint / HUGGINGFACE)
    before = stored  # what it was imported from has not the row that the import added
    if read_json(checkpoint / HUGGINGFACE / "config.json").get(ADDED):
        before = replace(stored, vocab_size=stored.vocab_size - 1)
    if shape not in (stored, replace(stored, tied=False), before):  # engines get it untied
        raise InputError(f"{hf_dir} is {shape}, but {checkpoint} is {stored}; compare its own")
    if quantized:
        yield "weights: " + _compare_quantized(hf_dir, checkpoint, shape, stored)
        return
    with (
        open_weights(hf_dir, shape) as weights,
        Progress(
            f"verify {name or hf_dir.name}",
            _bytes_to_read(weights, stored, manifest, extent),
            show=not quiet,
            unit=BYTES,
        ) as bar,
    ):
        listener = partial(_read, bar)
        narrow = "bf16" if "bf16" in (weights.stored_dtype(), manifest.dtype) else "fp32"
        get = read_weights(checkpoint, stored)
        if extent.weights:
            found = with_explicit_head(get, stored)
            yield "weights: " + compare_weights(weights, checkpoint, found, narrow, listener)
        model = streamed_megatron(stored, get, narrow, str(checkpoint), listener)
        yield "logits: " + compare_logits(weights, model, narrow, listener)
        yield "tokens: " + compare_tokens(weights, model, narrow, extent, listener)


def _read(progress: Progress, size: int) -> None:
    progress.advance(count=size)


def _bytes_to_read(
    weights: HFWeights, stored: ModelShape, manifest: Manifest, extent: Extent
) -> int:
    """Of both models in all comparisons. A forward of ours reads its layers, one of transformers'
    its output layer, too; a prompt that is a whole number of blocks takes the most passes.
    """
    from checkpoint_tools.streaming.megatron_weights import DTYPES

    passes = 0
    config = read_json(weights.directory / "config.json")
    if why_without_tokens(weights.directory, config) is None:
        block = int(config["block_size"])
        passes = extent.blocks * min(block, extent.most_passes)
    theirs, ours = (DTYPES[name].itemsize for name in (weights.stored_dtype(), manifest.dtype))
    shape = weights.model_shape
    ends = shape.vocab_size * shape.hidden  # the embedding, and the output layer
    whole = shape.parameters - ends * (not shape.tied)
    layers = stored.parameters - ends * (2 - stored.tied) - stored.hidden
    forwards = 1 + passes
    return (
        theirs * (shape.parameters * extent.weights + whole * forwards) + ours * layers * forwards
    )


def _compare_quantized(
    hf_dir: Path, checkpoint: Path, shape: ModelShape, stored: ModelShape
) -> str:
    """Its logits and tokens are not the checkpoint's: ``quantization.json`` says how far off."""
    from checkpoint_tools.quantization.fp8_weights import Fp8Weights, compare_fp8
    from checkpoint_tools.streaming.megatron_weights import read_weights

    record = read_record(hf_dir)
    get = with_explicit_head(read_weights(checkpoint, stored), stored)
    with Fp8Weights(hf_dir, shape) as weights:
        return compare_fp8(weights, get, record["unquantized_dtype"])


if __name__ == "__main__":
    command(main)
