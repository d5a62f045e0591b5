"""The chunked divergence against dense log-softmaxes with autograd: seconds and memory, forward and
backward, of KL(teacher || student) from M hidden states over a whole vocabulary.

    python -m benchmarks.divergence [--rows M ...] [--chunk-rows N ...] [--rounds N] [--limit-gib X]

One rank, float32. Every measurement is a process of its own; programs alternate and medians count.
Memory is the peak above what the inputs took (hidden states and output weights of both models), so
it holds the gradients of student and output weight, too. A dense run that would need more than the
limit is not started: it is marked with what it would need.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.denoising import WHOLE
from megatron_opdlm.divergence import Divergence, distillation_loss

GIB = 2**30
DENSE_COPIES = 5  # [M, V] float32 arrays that the dense program holds at its peak, as measured


class Inputs(NamedTuple):
    """Hidden states [M, H] and output weights [V, H]; logits have a standard deviation of 3."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor


class Measured(NamedTuple):
    """One run; ``seconds`` of wall clock, ``cpu_seconds`` of all threads."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    loss: float


def make_inputs(rows: int, hidden: int, vocabulary: int) -> Inputs:
    """The same numbers every time."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int, scale: float) -> Tensor:
        return torch.randn(count, hidden, generator=generator).mul_(scale)

    weights = [normal(vocabulary, 3 * hidden**-0.5) for _ in range(2)]
    states = [normal(rows, 1.0) for _ in range(2)]
    return Inputs(states[0].requires_grad_(), weights[0].requires_grad_(), states[1], weights[1])


def dense(inputs: Inputs, row_weight: Tensor) -> Tensor:
    """What a training script would write."""
    log_q = F.linear(inputs.student, inputs.student_weight).log_softmax(-1)
    with torch.no_grad():
        log_p = F.linear(inputs.teacher, inputs.teacher_weight).log_softmax(-1)
    value = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return (value * row_weight).sum()


def chunked(inputs: Inputs, row_weight: Tensor, chunk_rows: int) -> Tensor:
    """Ours."""
    return distillation_loss(
        *inputs,
        row_weight,
        Divergence(),
        columns=len(inputs.student_weight),
        reduction=WHOLE,
        chunk_rows=chunk_rows,
    ).total


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def measure(rows: int, hidden: int, vocabulary: int, chunk_rows: int) -> Measured:
    """One forward and backward in this process; ``chunk_rows`` 0 is the dense program."""
    inputs = make_inputs(rows, hidden, vocabulary)
    row_weight = torch.full((rows,), 1 / rows)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    loss = chunked(inputs, row_weight, chunk_rows) if chunk_rows else dense(inputs, row_weight)
    loss.backward()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Measured(wall, cpu, resident_bytes("VmHWM") - before, loss.item())


def measure_apart(*sizes: int) -> Measured:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.divergence", "--measure", *map(str, sizes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(*json.loads(done.stdout))


def compare(
    rows: int, hidden: int, vocabulary: int, programs: list[int], rounds: int
) -> dict[int, Measured]:
    """Medians of alternating runs by program (0: dense, else the rows of a chunk)."""
    runs: dict[int, list[Measured]] = {program: [] for program in programs}
    for _ in range(rounds):
        for program in programs:
            runs[program].append(measure_apart(rows, hidden, vocabulary, program))
    medians = {
        program: Measured(*(statistics.median(column) for column in zip(*made, strict=True)))
        for program, made in runs.items()
    }
    losses = [result.loss for result in medians.values()]
    assert max(losses) - min(losses) < 1e-5 * max(losses), losses
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-gib", type=float, default=10.0)
    parser.add_argument("--measure", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    print(
        f"V = {options.vocabulary}, H = {options.hidden}, float32, {torch.get_num_threads()} "
        f"thread(s), medians of {options.rounds} alternating runs"
    )
    print(f"{'M':>6}  {'program':<14} {'seconds':>8} {'CPU s':>8} {'peak GiB':>9}   against dense")
    for rows in options.rows:
        needed = DENSE_COPIES * 4 * rows * options.vocabulary / GIB
        programs = [*([0] if needed <= options.limit_gib else []), *options.chunk_rows]
        found = compare(rows, options.hidden, options.vocabulary, programs, options.rounds)
        if 0 not in found:
            print(f"{rows:>6}  {'dense':<14} {'not run':>8} {'':>8} {needed:>9.2f}   (estimated)")
        for program, result in found.items():
            name = f"chunks of {program}" if program else "dense"
            ratio = ""
            if program and 0 in found:
                ratio = (
                    f"   {found[0].cpu_seconds / result.cpu_seconds:.2f} x faster (CPU), "
                    f"{found[0].peak_bytes / result.peak_bytes:.1f} x less"
                )
            print(
                f"{rows:>6}  {name:<14} {result.seconds:>8.2f} {result.cpu_seconds:>8.2f} "
                f"{result.peak_bytes / GIB:>9.2f}{ratio}",
                flush=True,
            )


if __name__ == "__main__":
    main()
