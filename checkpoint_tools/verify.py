"""Compares a Hugging Face directory with a Megatron checkpoint: weights, logits and decoded tokens.

- weights: every tensor bit for bit, in the narrower of the two stored types;
- logits: transformers' Qwen3 and our GPTModel on one causal forward, both in float32;
- tokens: where the directory has the project's own ``generate``, its greedy tokens and those of our
  rollout engine, for prompts of every length modulo the block size.
"""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_tools.arguments import start_alone
from checkpoint_tools.hf_files import has_our_code
from checkpoint_tools.manifest import Manifest, read_manifest
from checkpoint_tools.qwen3_shape import Qwen3Shape, read_json, read_shape
from checkpoint_tools.safetensors_dir import HFWeights, open_weights
from checkpoint_tools.vocabulary import read_vocabulary
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.records import Prompt, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opdlm.model.qwen3 import Qwen3

LOGITS_TOLERANCE = 1e-4  # of max |difference|, float32
PROMPT_TOKENS = 24  # of the causal comparison; decoding prompts are shorter


def main() -> None:
    """Report each comparison; the first that fails ends the command with exit code 1."""
    parser = Arguments(prog="python -m checkpoint_tools.verify", description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint")
    arguments = parser.parse_args()
    start_alone("verify")
    shape = read_shape(arguments.hf)
    manifest = read_manifest(arguments.checkpoint)
    theirs = read_shape(arguments.checkpoint / "huggingface")
    if shape != theirs:
        raise InputError(f"{arguments.hf} is {shape}, but {arguments.checkpoint} is {theirs}")
    for result in compare(arguments.hf, arguments.checkpoint, manifest):
        print(result, flush=True)


def compare(hf_dir: Path, checkpoint: Path, manifest: Manifest) -> Iterator[str]:
    """Yield one line for each comparison that held. Raises RunError at the first that does not."""
    shape = read_shape(hf_dir)
    with open_weights(hf_dir, shape) as weights:
        narrow = "bf16" if "bf16" in (weights.stored_dtype(), manifest.dtype) else "fp32"
        yield "weights: " + compare_weights(weights, checkpoint, narrow)
    model = _build(checkpoint, shape, narrow)
    yield "logits: " + compare_logits(hf_dir, model, narrow)
    yield "tokens: " + compare_tokens(hf_dir, model, narrow)


def compare_weights(weights: HFWeights, checkpoint: Path, narrow: str) -> str:
    """Bit equality in the narrower type. Raises RunError with the first tensor that differs."""
    from checkpoint_tools.megatron_weights import DTYPES, read_weights
    from checkpoint_tools.qwen3_names import hf_from_megatron

    shape, dtype = weights.model_shape, DTYPES[narrow]
    for name, tensor in hf_from_megatron(shape, read_weights(checkpoint, shape)):
        expected, found = _bits(weights.get(name).to(dtype)), _bits(tensor.to(dtype))
        different = int((expected != found).sum())
        if different:
            raise RunError(
                f"{name} differs in {different} of {tensor.numel()} values between "
                f"{weights.directory} and {checkpoint}; export or import again"
            )
    return f"{len(weights.names())} tensors equal bit for bit in {narrow}"


def _bits(x: "Tensor") -> "Tensor":
    """Values as integers: NaN equals itself and -0 differs from 0."""
    import torch

    return x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def _build(checkpoint: Path, shape: Qwen3Shape, narrow: str) -> "Qwen3":
    """The checkpoint's GPTModel in float32, its weights rounded to the narrower type."""
    import torch

    from checkpoint_tools.megatron_weights import DTYPES, read_weights
    from checkpoint_tools.qwen3_names import hf_from_megatron
    from megatron_opdlm import parallel
    from megatron_opdlm.model.qwen3 import build_model, fill

    hardware = parallel.init(parallel.Layout())
    model = build_model(shape, parallel.Layout(), torch.float32, hardware, name=str(checkpoint))
    tensors = dict(hf_from_megatron(shape, read_weights(checkpoint, shape)))
    fill(model, lambda name: tensors[name].to(DTYPES[narrow]))
    return model.eval()


def _load_reference(
    model_class: Any, hf_dir: Path, like: "Qwen3", narrow: str, **options: Any
) -> Any:
    """A transformers model in float32 on the device of ``like``, its weights rounded likewise."""
    import torch
    from transformers.utils import logging

    from checkpoint_tools.megatron_weights import DTYPES

    logging.disable_progress_bar()
    reference = model_class.from_pretrained(hf_dir, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(DTYPES[narrow]))
    return reference.to(next(like.parameters()).device)


def compare_logits(hf_dir: Path, model: "Qwen3", narrow: str) -> str:
    """Causal logits of both implementations on a random sequence; RunError when they differ."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_opdlm.model.attention_plan import causal_plan
    from megatron_opdlm.model.vocab_parallel import project

    shape, device = model.shape, next(model.parameters()).device
    length = min(PROMPT_TOKENS, shape.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, (length,), generator=generator).to(device)
    # The classes are named: no code of the directory runs. transformers 4 needs a flat rope_theta.
    keys: dict[str, Any] = {**read_json(hf_dir / "config.json"), "rope_theta": shape.rope_theta}
    config = Qwen3Config(**keys)
    reference = _load_reference(Qwen3ForCausalLM, hf_dir, model, narrow, config=config)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        plan = causal_plan([length], length, device)
        hidden = model.run(ids, torch.arange(length, device=device), plan).flatten(0, 1)
        logits = project(hidden, model.head_weight, model.shard)[:, : shape.vocab_size]
    difference, scale = float((logits - expected).abs().max()), float(expected.std())
    measured = f"largest difference {difference:.2g}, standard deviation {scale:.3g}"
    if not difference <= LOGITS_TOLERANCE * max(1.0, scale):
        raise RunError(
            f"causal logits of {hf_dir} and of the checkpoint differ ({measured}) though the "
            "weights are equal: their config.json disagree; export or import again"
        )
    return f"causal, {length} tokens, {measured}"


def compare_tokens(hf_dir: Path, model: "Qwen3", narrow: str) -> str:
    """Greedy tokens of ``generate`` and of the rollout engine; RunError when they differ."""
    config = read_json(hf_dir / "config.json")
    if config.get("model_type") != "a2d-qwen3":
        return "not compared (the directory has no block-diffusion generate)"
    if not has_our_code(hf_dir):
        return "not compared (the directory's code is another version's and was not run)"
    import torch

    reference = _load_reference(_exported_class(hf_dir), hf_dir, model, narrow)
    block = int(config["block_size"])
    vocabulary = read_vocabulary(hf_dir)
    drawable = sorted(set(range(vocabulary.size)) - set(vocabulary.forbidden_ids))
    lengths = range(block + 1, 2 * block + 1)  # every length modulo the block size
    prompts = [[drawable[(7 * i + n) % len(drawable)] for i in range(n)] for n in lengths]
    for prompt, found in zip(prompts, _decode(model, vocabulary, prompts, block), strict=True):
        ids = torch.tensor([prompt], device=reference.device)
        expected = reference.generate(ids, max_new_tokens=3 * block)[0, len(prompt) :].tolist()
        if found != expected:
            raise RunError(
                f"greedy tokens differ after the prompt {prompt}: {hf_dir} gives {expected}, the "
                f"checkpoint {found}; export again with this version"
            )
    return f"greedy, {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, equal"


def _exported_class(hf_dir: Path) -> Any:
    """The model class of an export, imported from where it lies (transformers would copy it)."""
    package = types.ModuleType("exported_model")
    package.__path__ = [str(hf_dir)]
    for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
        del sys.modules[name]
    sys.modules[package.__name__] = package
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module = importlib.import_module("exported_model.modeling_a2d_qwen3")
    finally:
        sys.dont_write_bytecode = writes_bytecode
    return module.A2DQwen3LMHeadModel


def _decode(
    model: "Qwen3", vocabulary: Vocabulary, prompts: list[list[int]], block: int
) -> list[list[int]]:
    """Responses of the rollout engine, static decoding, one token a pass."""
    from megatron_opdlm.diffusion.decoding import Decoding
    from megatron_opdlm.rollout import Request, generate

    rules = Decoding(block_size=block, denoising_steps=block, max_new_tokens=3 * block)
    requests = [
        Request(sample=i, prompt=Prompt(index=i, ids=ids), max_new_tokens=rules.max_new_tokens)
        for i, ids in enumerate(prompts)
    ]
    made = generate(model, requests, rules.validate(), vocabulary, key=(0, 0))
    return [trajectory.user_ids for trajectory in made.trajectories]


if __name__ == "__main__":
    command(main)
