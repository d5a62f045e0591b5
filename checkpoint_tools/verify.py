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

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_tools.arguments import add_quiet, start_alone
from checkpoint_tools.export.formats import code_of, with_explicit_head
from checkpoint_tools.export.own_code import foreign_code
from checkpoint_tools.quantization.export import is_quantized, read_record
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.families import LAYOUTS
from megatron_opdlm.model_files.huggingface_files import ADDED
from megatron_opdlm.model_files.manifest import HUGGINGFACE, Manifest, check_contents, read_manifest
from megatron_opdlm.model_files.safetensors_dir import HFWeights, open_weights
from megatron_opdlm.model_files.shape import ModelShape, read_json, read_shape
from megatron_opdlm.model_files.vocabulary import read_vocabulary
from megatron_opdlm.records import Prompt, Vocabulary
from megatron_opdlm.reporting.progress import BYTES, Progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoint_tools.streaming.streamed_models import Listener
    from megatron_opdlm.model.gpt import LanguageModel


LOGITS_TOLERANCE = 1e-4  # of max |difference|, float32
PROMPT_TOKENS = 24  # of the causal comparison; decoding prompts are shorter


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is compared. Every denoising pass reads the files once, and the converted weights
    once for each prompt.
    """

    weights: bool  # False: they have been, while they were written
    longest_prompt: int  # blocks; every prompt has more than one
    most_prompts: int | None  # their lengths are spread evenly; None: one of every length
    most_values: int  # weights times prompts, where that leaves two prompts or more
    blocks: int  # that are decoded of each
    most_passes: int  # per block

    def lengths(self, block: int, parameters: int) -> list[int]:
        """Of the prompts, in tokens, for a model of so many weights: the longest is a multiple of
        the block.
        """
        count, step = (self.longest_prompt - 1) * block, 1
        if self.most_prompts is not None:
            prompts = min(self.most_prompts, max(2, self.most_values // parameters))
            step = -(-count // prompts) | 1  # odd: they end at different places of their blocks
        return list(range(self.longest_prompt * block, block, -step))[::-1]


FULL = Extent(
    weights=True, longest_prompt=2, most_prompts=None, most_values=0, blocks=2, most_passes=4
)
SAMPLE = Extent(
    weights=False, longest_prompt=3, most_prompts=8, most_values=2**31, blocks=1, most_passes=2
)


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
    if _why_without_tokens(weights.directory, config) is None:
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


def compare_weights(
    weights: HFWeights,
    checkpoint: Path,
    get: "Callable[[str], Tensor]",
    narrow: str,
    listener: "Listener",
) -> str:
    """Bit equality in the narrower type. Raises RunError with the first tensor that differs."""
    from megatron_opdlm.model_files.names import hf_from_megatron

    for name, tensor in hf_from_megatron(weights.model_shape, get):
        compare_tensor(weights, name, tensor, narrow, checkpoint)
        listener(weights.nbytes(name))
    return f"{len(weights.names())} tensors equal bit for bit in {narrow}"


def compare_tensor(
    weights: HFWeights, name: str, tensor: "Tensor", narrow: str, checkpoint: Path
) -> None:
    """Bit equality of one tensor of the checkpoint with the directory's in the narrower type.
    Raises RunError where they differ.
    """
    import torch

    from checkpoint_tools.streaming.megatron_weights import DTYPES

    dtype = DTYPES[narrow]
    found, expected = _bits(weights.get(name).to(dtype)), _bits(tensor.to(dtype))
    if not torch.equal(found, expected):
        raise RunError(
            f"{name} differs in {int((found != expected).sum())} of {tensor.numel()} values "
            f"between {weights.directory} and {checkpoint}; export or import again"
        )


def _bits(x: "Tensor") -> "Tensor":
    """Values as integers: NaN equals itself and -0 differs from 0."""
    import torch

    return x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def compare_logits(
    weights: HFWeights, model: "LanguageModel", narrow: str, listener: "Listener"
) -> str:
    """Causal logits of both implementations on a random sequence; RunError when they differ."""
    import torch

    from checkpoint_tools.streaming.streamed_models import streamed_transformers
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.model.attention_plan import causal_plan
    from megatron_opdlm.model.vocab_parallel import project

    shape, device = weights.model_shape, select_hardware().device
    length = min(PROMPT_TOKENS, shape.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, (length,), generator=generator).to(device)
    model_class, config = _transformers_own(weights)
    reference, _ = streamed_transformers(model_class, config, weights, narrow, listener)
    with torch.inference_mode():
        expected = reference(ids[None], use_cache=False).logits[0]
        plan = causal_plan([length], length, device)
        hidden = model.run(ids, torch.arange(length, device=device), plan).flatten(0, 1)
        logits = project(hidden, model.head_weight, model.shard)[:, : shape.vocab_size]
    difference, scale = float((logits - expected).abs().max()), float(expected.std())
    measured = f"largest difference {difference:.2g}, standard deviation {scale:.3g}"
    if not difference <= LOGITS_TOLERANCE * max(1.0, scale):
        raise RunError(
            f"causal logits of {weights.directory} and of the checkpoint differ ({measured}) "
            "though the weights are equal: their config.json disagree; export or import again"
        )
    return f"causal, {length} tokens, {measured}"


def _transformers_own(weights: HFWeights) -> tuple[Any, Any]:
    """Class and configuration of the autoregressive model; no code of the directory runs."""
    import transformers

    shape = weights.model_shape
    written = read_json(weights.directory / "config.json")
    # An implementation of attention can be a kernel from elsewhere.
    keys: dict[str, Any] = {k: v for k, v in written.items() if not k.endswith("implementation")}
    scaling = shape.rope_scaling.as_config() if shape.rope_scaling else None
    keys |= {
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
    }  # as transformers 4 needs them
    config = getattr(transformers, f"{shape.family.transformers}Config")(**keys)
    return getattr(transformers, shape.family.plain.architecture), config


def compare_tokens(
    weights: HFWeights,
    model: "LanguageModel",
    narrow: str,
    extent: Extent,
    listener: "Listener",
) -> str:
    """Greedy tokens of ``generate`` and of the rollout engine; RunError when they differ."""
    import torch

    from checkpoint_tools.streaming.streamed_models import streamed_transformers
    from megatron_opdlm.hardware import select_hardware

    hf_dir = weights.directory
    config = read_json(hf_dir / "config.json")
    reason = _why_without_tokens(hf_dir, config)
    if reason is not None:
        return f"not compared ({reason})"
    block = int(config["block_size"])
    steps = min(block, extent.most_passes)
    vocabulary = read_vocabulary(hf_dir)
    drawable = sorted(set(range(vocabulary.size)) - set(vocabulary.forbidden_ids))
    lengths = extent.lengths(block, weights.model_shape.parameters)
    prompts = [[drawable[(7 * i + n) % len(drawable)] for i in range(n)] for n in lengths]
    limits = [extent.blocks * block - length % block for length in lengths]  # up to a block's end
    found = _decode(model, vocabulary, prompts, limits, block, steps)
    reference, loading = streamed_transformers(*_exported_own(weights), weights, narrow, listener)
    _set_end_tokens(reference, hf_dir)
    device = select_hardware().device
    expected = loading.run(
        [
            partial(_generate, reference, torch.tensor([prompt], device=device), limit, steps)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
    )
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        if ours != theirs:
            raise RunError(
                f"greedy tokens differ after the prompt {prompt}: {hf_dir} gives {theirs}, the "
                f"checkpoint {ours}; export again with this version"
            )
    return f"greedy, {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, equal"


def _why_without_tokens(hf_dir: Path, config: dict[str, Any]) -> str | None:
    """Why a directory's tokens are not compared; None: they are."""
    layout = LAYOUTS.get(str(config["model_type"]))
    if layout is None or not layout.has_code:
        return "the directory has no block-diffusion generate"
    foreign = foreign_code(hf_dir)
    return f"{foreign}; the directory's code was not run" if foreign else None


def _generate(reference: Any, ids: "Tensor", limit: int, steps: int) -> list[int]:
    """The response of an exported model, ``limit`` tokens at most."""
    made = reference.generate(ids, max_new_tokens=limit, denoising_steps=steps)
    return made[0, ids.shape[1] :].tolist()


def _set_end_tokens(reference: Any, hf_dir: Path) -> None:
    """What ``from_pretrained`` would have read."""
    from transformers import GenerationConfig

    reference.generation_config = GenerationConfig.from_pretrained(hf_dir)


def _exported_own(weights: HFWeights) -> tuple[Any, Any]:
    """Class and configuration of an export whose code is ours, byte for byte: imported from our
    own files, so that nothing that lies in the directory can come before them.
    """
    layout = LAYOUTS[read_json(weights.directory / "config.json")["model_type"]]
    package = types.ModuleType("exported_model")
    package.__path__ = list(dict.fromkeys(str(file.parent) for file in code_of(layout)))
    for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
        del sys.modules[name]
    sys.modules[package.__name__] = package
    module = importlib.import_module(f"{package.__name__}.modeling_{layout.module}")
    model_class = getattr(module, layout.architecture)
    return model_class, model_class.config_class.from_pretrained(weights.directory)


def _decode(
    model: "LanguageModel",
    vocabulary: Vocabulary,
    prompts: list[list[int]],
    limits: list[int],
    block: int,
    steps: int,
) -> list[list[int]]:
    """Responses of the rollout engine to all prompts at once, static decoding."""
    from megatron_opdlm.configuration.engine_options import EngineOptions
    from megatron_opdlm.diffusion.decoding import Decoding
    from megatron_opdlm.rollout import Request, generate

    rules = Decoding(block_size=block, denoising_steps=steps, max_new_tokens=max(limits))
    requests = [
        Request(sample=i, prompt=Prompt(index=i, ids=ids), max_new_tokens=limit)
        for i, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    made = generate(
        model,
        requests,
        rules.validate(),
        vocabulary,
        key=(0, 0),
        # a captured forward would not fetch its weights again
        options=EngineOptions(attention="buckets"),
    )
    return [trajectory.user_ids for trajectory in made.trajectories]


if __name__ == "__main__":
    command(main)
