"""Rollout engine against a straightforward sampler: tokens per second on the same work.

    python -m benchmarks.rollout [--size tiny|wide | --case reference [--vocabulary V]] \
        [--lengths spread|equal] [--steps T]

Random weights, one rank, one thread, blocks of four tokens. Response lengths are fixed per prompt
(no end token), so both programs do the same work; a greedy warm-up shows that they make the same
tokens. Timed runs draw at temperature 1 and alternate; medians and the median of the pairs' ratios
count, of wall time and of the process's CPU seconds.

``--case reference`` is the case on which the method's public code was measured side by side with
ours, outside this repository: 8 layers x 256, ``--vocabulary`` 151,936 or 8,192, prompts of 40 to
120 tokens.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.static_batch_sampler import StaticResult, sample_static
from megatron_opdlm import parallel
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.blocks import block_lengths
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.slots import Request
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model.weights import fill
from megatron_opdlm.model_files.shape import ModelShape, hf_names
from megatron_opdlm.records import Prompt, Rollout, Trajectory, Vocabulary
from megatron_opdlm.rollout import generate

SHAPES = {
    "tiny": ModelShape(3, 64, 4, 2, 16, 128, 32, True, 1e6, 1e-6, 4096),
    # Half as wide as Qwen3-0.6B, its head's share of the operations kept.
    "wide": ModelShape(6, 512, 8, 4, 64, 1536, 12288, True, 1e6, 1e-6, 4096),
}
KEY = (1, 1)
BLOCK_SIZE = 4
T = TypeVar("T")


def random_model(shape: ModelShape) -> LanguageModel:
    """A model of this shape with normal weights (norms at 1), the same every time."""
    hardware = parallel.init(parallel.Layout())
    generator = torch.Generator().manual_seed(0)
    sizes = hf_names(shape)

    def weight(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(sizes[name])
        return torch.randn(sizes[name], generator=generator) * 0.05

    tensors = {name: weight(name) for name in sizes}
    model = build_model(shape, parallel.Layout(), torch.float32, hardware)
    fill(model, tensors.__getitem__)
    return model


def make_requests(
    prompts: int, lengths: str, vocab_size: int, prompt_tokens: tuple[int, int] = (5, 40)
) -> list[Request]:
    """Prompts of a number of tokens between two; responses of 8 to 160 tokens (spread 20 times) or
    64 each.
    """
    draw = random.Random(0)
    requests = []
    for number in range(prompts):
        ids = [draw.randrange(2, vocab_size - 1) for _ in range(draw.randint(*prompt_tokens))]
        tokens = 64 if lengths == "equal" else round(8 * 20 ** draw.random())
        prompt = Prompt(index=number, ids=ids)
        requests.append(Request(sample=number, prompt=prompt, max_new_tokens=tokens))
    return requests


def timed(run: Callable[[], T]) -> tuple[float, float, T]:
    """Wall seconds, CPU seconds and result."""
    start, busy = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - start, time.process_time() - busy, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--case", choices=("reference",), help="instead of --size")
    parser.add_argument("--vocabulary", type=int, default=151936, help="of --case reference")
    parser.add_argument("--lengths", choices=("spread", "equal"), default="spread")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps a block")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shape, prompt_tokens = SHAPES[options.size], (5, 40)
    if options.case == "reference":
        shape = ModelShape(8, 256, 4, 2, 64, 768, options.vocabulary, True, 1e6, 1e-6, 8192)
        prompt_tokens = (40, 120)
    model = random_model(shape)
    requests = make_requests(options.prompts, options.lengths, shape.vocab_size, prompt_tokens)
    mask = shape.vocab_size - 1
    vocabulary = Vocabulary(
        size=shape.vocab_size, mask_id=mask, end_ids=(), pad_id=0, forbidden_ids=(mask,)
    )
    decoding = Decoding(block_size=BLOCK_SIZE, temperature=1.0, denoising_steps=options.steps)
    greedy = replace(decoding, temperature=0.0)
    tokens = sum(request.max_new_tokens for request in requests)

    engine_options = EngineOptions(slots=options.slots)

    def engine(rules: Decoding) -> Rollout:
        return generate(model, requests, rules, vocabulary, key=KEY, options=engine_options)

    def baseline(rules: Decoding) -> StaticResult:
        return sample_static(model, requests, rules, vocabulary, key=KEY, batch_size=options.slots)

    same = [t.response_ids for t in engine(greedy).trajectories] == baseline(greedy).responses
    assert same, "engine and baseline disagree"
    rounds = [
        (timed(partial(engine, decoding)), timed(partial(baseline, decoding)))
        for _ in range(options.rounds)
    ]
    made, expected = rounds[-1][0][2], rounds[-1][1][2]
    times = [(a[:2], b[:2]) for a, b in rounds]
    ratio, busy_ratio = (statistics.median(b[what] / a[what] for a, b in times) for what in (0, 1))
    speed, busy_speed = (
        [tokens / statistics.median(pair[program][what] for pair in times) for program in (0, 1)]
        for what in (0, 1)
    )
    print(
        f"{options.case or options.size} ({shape.parameters:,} parameters), "
        f"{options.lengths} lengths, {options.steps} steps a block, {options.prompts} prompts, "
        f"{options.slots} slots, {tokens} tokens, median of {options.rounds} alternating runs:\n"
        f"  engine   {speed[0]:8.0f} tokens/s ({busy_speed[0]:.0f} a CPU second), "
        f"{forwards_per_block(made.trajectories):.2f} forwards per full block, "
        f"slot utilisation {made.slot_utilisation:.0%}\n"
        f"  baseline {speed[1]:8.0f} tokens/s ({busy_speed[1]:.0f} a CPU second), "
        f"{expected.forwards} forwards of whole batches\n"
        f"  ratio    {ratio:.2f}, of CPU time {busy_ratio:.2f}"
    )


def forwards_per_block(trajectories: Sequence[Trajectory]) -> float:
    """Mean over the blocks without prompt tokens; a sequence takes part in no forward beyond its
    blocks' passes.
    """
    passes: list[int] = []
    for trajectory in trajectories:
        blocks, start = [], 0
        lengths = block_lengths(
            len(trajectory.prompt.ids), len(trajectory.committed_at), BLOCK_SIZE
        )
        for length in lengths:
            blocks.append(max(trajectory.committed_at[start : start + length]))
            start += length
        assert trajectory.forwards == sum(blocks), "a forward that is no block's denoising pass"
        passes += [
            count for count, length in zip(blocks, lengths, strict=True) if length == BLOCK_SIZE
        ]
    return statistics.mean(passes)


if __name__ == "__main__":
    main()
