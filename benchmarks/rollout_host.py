"""CPU microseconds that the rollout's host spends per pass beside what a GPU runs.

    python -m benchmarks.rollout_host [--slots 64 512] [--block 4 32] [--rounds 5]

The model gives zeros, since what it computes is not the host's work; draws and commits of fixed
size are "captured" by calling them again, and their time is taken out, as is that of zeroing the
cache. What stays is admission, pages, reports, sizes and the calls themselves. Medians of whole
calls after the first, whose decoder is kept: as many requests again as there are slots, of 32 to 64
tokens, so that sequences enter and leave far more often than in real rollouts.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_speed import SHAPES, random_model
from megatron_opdlm import parallel, rollout
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine import decoder
from megatron_opdlm.engine.decoder import DecoderKeeper
from megatron_opdlm.engine.passes import FixedPasses
from megatron_opdlm.engine.slots import Request
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.records import Prompt, Vocabulary


class Device:
    """Stands in for a GPU; counts its own time."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed_run(*arguments: Any, **options: Any) -> Any:
            self.depth += 1
            start = time.thread_time()
            result = run(*arguments, **options)
            self.depth -= 1
            if not self.depth:
                self.seconds += time.thread_time() - start
            return result

        return timed_run


def give_zeros(model: LanguageModel, most: int) -> None:
    """Let the model compute nothing, for up to ``most`` tokens."""
    zeros = torch.zeros(most, 1, model.shape.hidden)

    def run(tokens_N: Tensor, position_N: Tensor, plan: AttentionPlan) -> Tensor:
        return zeros[: len(tokens_N) if plan.read is None else len(plan.read)]

    vars(model)["run"] = run


def make_requests(count: int) -> list[Request]:
    """16 prompt tokens and 32 to 64 of response each."""
    draw = random.Random(0)
    return [
        Request(
            sample=i,
            prompt=Prompt(index=i, ids=[draw.randrange(60) for _ in range(16)]),
            max_new_tokens=draw.randint(32, 64),
        )
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--block", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hardware = parallel.init(parallel.Layout())
    shape = replace(SHAPES["tiny"], vocab_size=64)
    model = random_model(shape, hardware)
    give_zeros(model, 2**20)
    mask = shape.vocab_size - 1
    vocabulary = Vocabulary(
        size=shape.vocab_size, mask_id=mask, end_ids=(), pad_id=0, forbidden_ids=(mask,)
    )
    device = Device()
    record = replace(hardware, captures=lambda: device.timed)
    rollout.select_hardware = lambda: record
    FixedPasses._forward = device.timed(FixedPasses._forward)
    decoder.open_cache = device.timed(decoder.open_cache)
    for block in options.block:
        rules = Decoding(block_size=block, denoising_steps=block, temperature=1.0)
        for slots in options.slots:
            engine = EngineOptions(slots=slots, attention="rows", kv_cache_tokens=2**20)
            figures, passes, keeper = [], 0.0, DecoderKeeper()
            requests = make_requests(2 * slots)
            for _ in range(1 + options.rounds):
                device.seconds = 0.0
                start = time.thread_time()
                made = rollout.generate(
                    model,
                    requests,
                    rules,
                    vocabulary,
                    key=(1, 1),
                    options=engine,
                    keeper=keeper,
                )
                host = time.thread_time() - start - device.seconds
                running = sum(t.passes for t in made.trajectories)
                passes = running / (made.slots * made.slot_utilisation)
                figures.append(1e6 * host / passes)
            print(
                f"B {block:2d}, {slots:3d} slots: {statistics.median(figures[1:]):5.0f} us a pass, "
                f"{passes:.0f} passes, {len(requests)} requests",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
