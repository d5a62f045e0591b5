"""CPU microseconds that the rollout's host spends per pass beside what a GPU would replay.

    python -m benchmarks.rollout_host [--slots 64 512] [--block 4 32]

A tiny model; forwards, draws and commits of fixed size are "captured" by calling them again, and
their time is taken out, as is that of the long forwards in which prompts join. What stays is
admission, pages, reports, sizes and the calls themselves: on a GPU the part that runs beside the
device.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.decode_speed import SHAPES, random_model
from megatron_opdlm import parallel, rollout
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.passes import FixedPasses
from megatron_opdlm.engine.slots import Request
from megatron_opdlm.records import Prompt, Vocabulary


class Device:
    """Stands in for a GPU; counts its own time."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def timed(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed_run(*arguments: object) -> Tensor:
            self.depth += 1
            start = time.thread_time()
            result = run(*arguments)
            self.depth -= 1
            if not self.depth:
                self.seconds += time.thread_time() - start
            return result

        return timed_run

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return self.timed(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--block", type=int, nargs="+", default=[4, 32])
    options = parser.parse_args()
    hardware = parallel.init(parallel.Layout())
    shape = SHAPES["tiny"]
    model = random_model(shape, hardware)
    mask = shape.vocab_size - 1
    vocabulary = Vocabulary(
        size=shape.vocab_size, mask_id=mask, end_ids=(mask - 1,), pad_id=0, forbidden_ids=(mask,)
    )
    device = Device()
    rollout.select_hardware = lambda: replace(hardware, captures=lambda: device.capture)
    long_forward = FixedPasses._forward
    for block in options.block:
        for slots in options.slots:
            draw = random.Random(0)
            requests = [
                Request(
                    sample=i,
                    prompt=Prompt(index=i, ids=[draw.randrange(60) for _ in range(16)]),
                    max_new_tokens=draw.randint(32, 64),
                )
                for i in range(2 * slots)
            ]
            rules = Decoding(block_size=block, denoising_steps=block, temperature=1.0)
            device.seconds = 0.0
            FixedPasses._forward = device.timed(long_forward)
            launch, passes = FixedPasses.launch, [0]

            def counted(*arguments: object, launch=launch, passes=passes) -> object:
                passes[0] += 1
                return launch(*arguments)

            FixedPasses.launch = counted  # pyright: ignore[reportAttributeAccessIssue]
            start = time.thread_time()
            engine = EngineOptions(slots=slots, attention="rows", kv_cache_tokens=10**6)
            rollout.generate(model, requests, rules, vocabulary, key=(1, 1), options=engine)
            host = time.thread_time() - start - device.seconds
            FixedPasses.launch, FixedPasses._forward = launch, long_forward
            print(f"B {block:2d}, {slots:3d} slots: {1e6 * host / passes[0]:5.0f} us a pass")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
