"""How a Hugging Face directory is compared with a checkpoint: weights bit for bit, logits, greedy
tokens. ``verify`` and ``export_hf`` say which of them, and how much.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_tools.export.formats import code_of
from checkpoint_tools.export.own_code import foreign_code
from megatron_opdlm.errors import RunError
from megatron_opdlm.model_files.families import LAYOUTS
from megatron_opdlm.model_files.safetensors_dir import HFWeights
from megatron_opdlm.model_files.shape import read_json
from megatron_opdlm.model_files.vocabulary import read_vocabulary
from megatron_opdlm.records import Prompt, Vocabulary

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
    reason = why_without_tokens(hf_dir, config)
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


def why_without_tokens(hf_dir: Path, config: dict[str, Any]) -> str | None:
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
