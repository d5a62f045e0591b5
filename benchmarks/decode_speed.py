"""Tokens per second of the rollout engine at real model sizes, and how near to the memory's limit.

    python -m benchmarks.decode_speed [--shape qwen3-0.6b|qwen3-1.7b|tiny] [--sequences 1 16 64 256]

Random weights, one rank, the hardware's default dtype, static decoding. A forward has to read every
weight once and the keys and values of every sequence; that over the speed at which this machine
copies memory is the least time a forward can take, and the share of it that the engine reaches is
printed. With many sequences arithmetic becomes the limit, and the share must fall.
"""

import argparse
import time

import torch

from megatron_opdlm import parallel
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.slots import Request
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.records import Prompt, Rollout, Vocabulary
from megatron_opdlm.rollout import generate

SHAPES = {  # the published configurations
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072, 151936, True, 1e6, 1e-6, 40960),
    "qwen3-1.7b": ModelShape(28, 2048, 16, 8, 128, 6144, 151936, True, 1e6, 1e-6, 40960),
    "tiny": ModelShape(3, 64, 4, 2, 16, 128, 512, True, 1e6, 1e-6, 4096),
}
BLOCK_SIZE = 4


def random_model(shape: ModelShape, hardware: Hardware) -> LanguageModel:
    """Normal weights of standard deviation 0.02, norms at 1."""
    model = build_model(shape, parallel.Layout(), hardware.dtype, hardware)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)
    return model


def bytes_per_second(hardware: Hardware, size: int) -> float:
    """Speed of reading and writing memory: the best of five copies of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=hardware.device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        int(target[-1])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def least_bytes(shape: ModelShape, dtype: torch.dtype, sequences: int, context: float) -> float:
    """What one denoising forward must read: every weight, and all cached keys and values."""
    cached = 2 * shape.layers * shape.groups * shape.head_dim * context * sequences
    return dtype.itemsize * (shape.parameters + cached)


def make_requests(sequences: int, prompt: int, response: int, vocab_size: int) -> list[Request]:
    """Requests of equal lengths."""
    draw = torch.Generator().manual_seed(0)
    return [
        Request(
            sample=number,
            prompt=Prompt(
                index=number,
                ids=torch.randint(2, vocab_size - 1, (prompt,), generator=draw).tolist(),
            ),
            max_new_tokens=response,
        )
        for number in range(sequences)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--response", type=int, default=256, help="tokens")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps a block")
    parser.add_argument("--attention", choices=("auto", "buckets", "rows"), default="auto")
    parser.add_argument("--no-graphs", action="store_true", help="launch kernels one by one")
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the bandwidth test")
    options = parser.parse_args()
    hardware = parallel.init(parallel.Layout())
    shape = SHAPES[options.shape]
    model = random_model(shape, hardware)
    mask = shape.vocab_size - 1
    vocabulary = Vocabulary(
        size=shape.vocab_size, mask_id=mask, end_ids=(), pad_id=0, forbidden_ids=(mask,)
    )
    rules = Decoding(block_size=BLOCK_SIZE, denoising_steps=options.steps, temperature=1.0)
    speed = bytes_per_second(hardware, options.copy_mib * 2**20)

    def run(sequences: int, response: int) -> tuple[float, Rollout]:
        requests = make_requests(sequences, options.prompt, response, shape.vocab_size)
        start = time.perf_counter()
        made = generate(
            model,
            requests,
            rules,
            vocabulary,
            key=(1, 1),
            options=EngineOptions(
                slots=sequences, attention=options.attention, graphs=not options.no_graphs
            ),
        )
        return time.perf_counter() - start, made

    print(
        f"{options.shape} ({shape.parameters / 1e6:.0f} M parameters), {hardware.dtype}, "
        f"{hardware.reason}; prompts of {options.prompt}, responses of {options.response} tokens, "
        f"{options.steps} steps a block of {BLOCK_SIZE}; memory {speed / 1e9:.0f} GB/s\n"
        "sequences   tokens/s   ms per forward   share of the memory limit"
    )
    for sequences in options.sequences:
        run(sequences, 2 * BLOCK_SIZE)  # warm-up
        seconds, made = run(sequences, options.response)
        forwards = made.trajectories[0].forwards
        context = options.prompt + options.response / 2
        least = least_bytes(shape, hardware.dtype, sequences, context) / speed
        print(
            f"{sequences:9d} {sequences * options.response / seconds:10.0f} "
            f"{1000 * seconds / forwards:16.2f} {least * forwards / seconds:27.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
