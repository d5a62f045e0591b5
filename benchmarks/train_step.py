"""One optimizer update against a straightforward one: seconds and peak memory on the same states.

    python -m benchmarks.train_step [--size vocabulary|tiny|wide|135m | --case reference] \
        [--vocabulary V] [--sequences N] [--rounds N] [--lengths TOKENS ...] [--shared N] \
        [--types] [dotted.key=value ...]

Ours is what training does after the rollout: pack, ask the teacher, update. The baseline is
``benchmarks/padded_update.py``. Random weights, one rank, one thread. Responses spread 20 times in
length (fixed seed), one partially denoised state each. Loss and gradient norm of the two must
agree to 1e-5 in every round (1e-2 with ``model.dtype=bf16``); runs alternate, medians count. Peak
memory is that of each program in a process of its own (Linux: VmHWM), with and without what Python
and the libraries take before a model is built. The keys are training's (``loss.chunk_rows``,
``update.tokens_per_microbatch``, ``model.dtype``); the baseline has no such choices, and computes
in float32.

``--case reference`` is the case on which the method's public code was measured side by side with
ours, outside this repository: 8 layers x 256, ``--vocabulary`` 151,936 or 8,192, eight rows, one at
a time in the baseline, of 64 to 512 response tokens after prompts of 40 to 120.

``--shared 4`` compares ours with itself: four responses of 48 tokens to every prompt of 72, packed
as trees and each with a prompt of its own; as many prompts as ``--sequences``.

``--types`` compares ours with itself in float32 and in bfloat16, within 3e-2.

``--lengths 128 512 2048`` compares ours with itself: updates of the same number of response tokens
(the longest length), in responses of each length, in turn; process CPU seconds count.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.padded_update import PaddedUpdate
from megatron_opdlm import parallel
from megatron_opdlm.config import Config, load_config
from megatron_opdlm.model.gpt import build_model
from megatron_opdlm.model.weights import fill
from megatron_opdlm.model_files.shape import ModelShape, hf_names
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.records import Prompt, State, Trajectory, Vocabulary
from megatron_opdlm.run import build
from megatron_opdlm.run.session import packing_of
from megatron_opdlm.states import choose_states
from megatron_opdlm.teacher import score
from megatron_opdlm.update import update


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the states that it is trained on."""

    shape: ModelShape
    longest: int  # response tokens
    spread: float = 20  # longest response / shortest
    prompts: tuple[int, int] = (8, 64)  # tokens of the shortest and of the longest one

    @property
    def vocabulary(self) -> Vocabulary:
        size = self.shape.vocab_size
        mask = size - 1
        return Vocabulary(size=size, mask_id=mask, end_ids=(), pad_id=0, forbidden_ids=(mask,))


WIDE = ModelShape(8, 256, 4, 2, 64, 768, 8192, True, 1e6, 1e-6, 8192)
SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, True, 1e5, 1e-5, 8192)  # SmolLM2-135M's
SIZES = {
    "vocabulary": Case(
        shape=ModelShape(4, 128, 4, 2, 32, 384, 151936, True, 1e6, 1e-6, 4096), longest=1024
    ),
    "wide": Case(shape=WIDE, longest=512),
    "tiny": Case(shape=ModelShape(3, 64, 4, 2, 16, 128, 32, True, 1e6, 1e-6, 4096), longest=160),
    "135m": Case(shape=SMOLLM2, longest=96, spread=1, prompts=(60, 80)),
}
REFERENCE = Case(shape=WIDE, longest=512, spread=8, prompts=(40, 120))
BLOCK = 4  # tokens
KEY = (1, 1)
GIB = 2**30
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # relative; of the loss and of the gradient norm
Update = Callable[[Sequence[State]], tuple[float, float]]  # states -> (loss, gradient norm)


def chosen_case(options: argparse.Namespace) -> Case:
    """What the command line asks for."""
    if options.case == "reference":
        return replace(REFERENCE, shape=replace(WIDE, vocab_size=options.vocabulary))
    return SIZES[options.size]


def random_weights(shape: ModelShape, seed: int) -> dict[str, torch.Tensor]:
    """Normal weights (norms at 1) under Hugging Face names; flat enough for a KL of a few nats."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(size)
        if name.endswith("norm.weight")
        else torch.randn(size, generator=generator) * 0.05
        for name, size in hf_names(shape).items()
    }


def make_states(sequences: int, case: Case) -> list[State]:
    """One state of each of ``sequences`` responses of the case's lengths, evenly spread over the
    logarithm of the length.
    """
    longest, vocabulary = case.longest, case.vocabulary
    draw = random.Random(0)
    trajectories = []
    for sample in range(sequences):
        prompt = [
            draw.randrange(2, vocabulary.size - 1) for _ in range(draw.randint(*case.prompts))
        ]
        tokens = round(longest * case.spread ** (-sample / max(sequences - 1, 1)))
        tokens += -(len(prompt) + tokens) % BLOCK
        response = [draw.randrange(2, vocabulary.size - 1) for _ in range(tokens)]
        trajectories.append(_recorded(sample, prompt, response, draw))
    draw.shuffle(trajectories)
    return _states(trajectories, vocabulary)


def _states(trajectories: Sequence[Trajectory], vocabulary: Vocabulary) -> list[State]:
    """One partially denoised state of each."""
    return choose_states(
        trajectories,
        mode="one_per_block",
        block_size=BLOCK,
        vocabulary=vocabulary,
        exclude_eos=False,
        key=KEY,
    )


def _recorded(
    sample: int, prompt: list[int], response: list[int], draw: random.Random
) -> Trajectory:
    """A response whose every block committed one token a pass, in a random order."""
    blocks = range(len(prompt) // BLOCK, (len(prompt) + len(response)) // BLOCK)
    passes = [at for _ in blocks for at in draw.sample(range(1, BLOCK + 1), BLOCK)]
    return Trajectory(
        sample=sample,
        prompt=Prompt(index=sample, ids=prompt),
        response_ids=response,
        committed_at=passes[len(prompt) % BLOCK :],
        response_tokens=len(response),
        finish_reason="length",
        forwards=0,
        passes=0,
    )


def our_update(case: Case, config: Config, *, share: bool = True) -> Update:
    """What training does with the states of one update."""
    hardware, shape = parallel.init(parallel.Layout()), case.shape
    source = build.ModelSource(
        directory=Path(), shape=shape, vocabulary=case.vocabulary, contract=None, low_rank=None
    )
    student = build.build_student(source, config, hardware, load=False)
    fill(student.model, random_weights(shape, seed=0).__getitem__)
    student.optimizer.reload_model_params()
    teacher_dtype = build.resolve_dtype(config.teacher.dtype, hardware)
    teacher = build_model(shape, parallel.Layout(), teacher_dtype, hardware)
    fill(teacher, random_weights(shape, seed=1).__getitem__)
    teacher = teacher.requires_grad_(False).eval()
    objective = build.build_objective(config, teacher)

    def run(states: Sequence[State]) -> tuple[float, float]:
        packing = packing_of(config, source, hardware)
        packing = replace(packing, share_student=share, share_teacher=share)
        step = pack_step([states], packing)
        targets = score(teacher, step.finished)
        report = update(student, step.updates[0], targets, objective, config.optimizer.lr)
        return sum(report.sequence_loss) / len(states), report.grad_norm

    return run


def padded_update(case: Case, config: Config) -> Update:
    """The baseline on the same weights."""
    torch.set_num_threads(1)
    return PaddedUpdate(
        case.shape,
        random_weights(case.shape, seed=0),
        random_weights(case.shape, seed=1),
        block_size=config.rollout.block_size,
        mask_id=case.vocabulary.mask_id,
        lr=config.optimizer.lr,
        clip_grad=config.optimizer.clip_grad,
    ).update


PROGRAMS = {"ours": our_update, "padded": padded_update}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measured_in_a_process(program: str, arguments: Sequence[str]) -> tuple[int, int]:
    """Peak bytes of one program that makes two updates and nothing else: of the process, and above
    what it took before it built a model.
    """
    command = [sys.executable, "-m", "benchmarks.train_step", "--only", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed: {done.stderr.strip().splitlines()[-1]}")
    peak, before = map(int, done.stdout.split()[-2:])
    return peak, peak - before


def timed(run: Update, states: Sequence[State]) -> tuple[float, float, tuple[float, float]]:
    """Wall seconds, CPU seconds and result."""
    start, busy = time.perf_counter(), time.process_time()
    result = run(states)
    return time.perf_counter() - start, time.process_time() - busy, result


def require_equal(ours: tuple[float, float], padded: tuple[float, float], tolerance: float) -> None:
    """The same loss and gradient norm; else the ratio would compare two tasks."""
    for what, a, b in zip(("loss", "gradient norm"), ours, padded, strict=True):
        assert abs(a - b) <= tolerance * abs(b), f"{what}: ours {a}, padded {b}"


def compare_sharing(case: Case, config: Config, prompts: int, each: int, rounds: int) -> None:
    """CPU seconds of an update with ``each`` responses to every prompt, its prompts packed once and
    every time."""
    draw, vocabulary = random.Random(0), case.vocabulary
    run, apart = our_update(case, config), our_update(case, config, share=False)
    trajectories = []
    for number in range(prompts):
        prompt = [draw.randrange(2, vocabulary.size - 1) for _ in range(72)]
        for sample in range(number * each, (number + 1) * each):
            response = [draw.randrange(2, vocabulary.size - 1) for _ in range(48)]
            trajectories.append(_recorded(sample, prompt, response, draw))
    states = _states(trajectories, vocabulary)
    seconds: dict[str, list[float]] = {"shared": [], "apart": []}
    for number in range(rounds + 1):
        _, busy, shared = timed(run, states)
        _, busy_apart, alone = timed(apart, states)
        require_equal(shared, alone, TOLERANCE["fp32"])
        if number:  # the first is a warm-up
            seconds["shared"].append(busy)
            seconds["apart"].append(busy_apart)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    print(
        f"{prompts} prompts of 72 tokens, {each} responses of 48 each, median CPU seconds of "
        f"{rounds} rounds: packed once {middle['shared']:.3f} s, every time "
        f"{middle['apart']:.3f} s, ratio {middle['apart'] / middle['shared']:.2f}"
    )


def compare_lengths(case: Case, config: Config, lengths: Sequence[int], rounds: int) -> None:
    """CPU seconds of an update of the same response tokens in responses of each length."""
    run, most = our_update(case, config), max(lengths)
    updates = {n: make_states(most // n, replace(case, longest=n, spread=1)) for n in lengths}
    seconds: dict[int, list[float]] = {n: [] for n in lengths}
    for number in range(rounds + 1):
        for length, states in updates.items():
            busy = timed(run, states)[1]
            if number:  # the first is a warm-up
                seconds[length].append(busy)
    first = statistics.median(seconds[lengths[0]])
    print(f"{most} response tokens an update, median CPU seconds of {rounds} rounds:")
    for length, found in seconds.items():
        middle = statistics.median(found)
        print(f"  {most // length:3d} of {length:5d} tokens {middle:8.3f} s {middle / first:6.2f}")


def compare_types(case: Case, overrides: Sequence[str], sequences: int, rounds: int) -> None:
    """CPU seconds of an update with student and teacher in float32 and in bfloat16."""
    states = make_states(sequences, case)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    runs = {
        dtype: our_update(
            case, load_config(None, [*overrides, f"model.dtype={dtype}", f"teacher.dtype={dtype}"])
        )
        for dtype in seconds
    }
    for number in range(rounds + 1):
        found = {dtype: timed(run, states) for dtype, run in runs.items()}
        require_equal(found["bf16"][2], found["fp32"][2], 3 * TOLERANCE["bf16"])  # 30 layers
        if number:  # the first is a warm-up
            for dtype, (_, busy, _) in found.items():
                seconds[dtype].append(busy)
    full, half = map(statistics.median, seconds.values())
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(
        f"{case.shape.parameters:,} parameters, {len(states)} responses, median CPU seconds of "
        f"{rounds} rounds: float32 {full:.3f} s, bfloat16 {half:.3f} s, ratio {ratio:.2f}"
    )


def compare_programs(options: argparse.Namespace, case: Case, config: Config) -> None:
    """Ours and the baseline on the same states: time in this process, memory in their own."""
    arguments = ["--size", options.size, "--sequences", str(options.sequences)]
    if options.case:
        arguments += ["--case", options.case, "--vocabulary", str(options.vocabulary)]
    arguments += options.overrides
    peaks = [measured_in_a_process(name, arguments) for name in PROGRAMS]
    states = make_states(options.sequences, case)
    ours, padded = (make(case, config) for make in PROGRAMS.values())
    tolerance = TOLERANCE["bf16" if config.model.dtype == "bf16" else "fp32"]
    pairs = []
    for number in range(options.rounds + 1):
        pair = timed(ours, states), timed(padded, states)
        require_equal(pair[0][2], pair[1][2], tolerance)
        if number:  # the first is a warm-up
            pairs.append(pair)
    wall, busy = (
        [statistics.median(pair[program][what] for pair in pairs) for program in (0, 1)]
        for what in (0, 1)
    )
    lengths = [len(state.response_ids) for state in states]
    print(
        f"{options.case or options.size} ({case.shape.parameters:,} parameters, vocabulary "
        f"{case.shape.vocab_size:,}), {len(states)} responses of {min(lengths)} to {max(lengths)} "
        f"tokens (mean {statistics.mean(lengths):.0f}), median of {options.rounds} alternating "
        "updates:"
    )
    for number, (name, (peak, above)) in enumerate(zip(PROGRAMS, peaks, strict=True)):
        print(
            f"  {name:8s}{wall[number]:8.3f} s an update ({busy[number]:.3f} s CPU), "
            f"peak memory {peak / GIB:.2f} GiB, {above / GIB:.2f} without Python and libraries"
        )
    of_peak, of_above = (b / a for a, b in zip(*peaks, strict=True))
    print(
        f"  padded / ours: time {statistics.median(b[0] / a[0] for a, b in pairs):.1f}, CPU time "
        f"{statistics.median(b[1] / a[1] for a, b in pairs):.1f}, memory {of_peak:.1f}, "
        f"{of_above:.1f} without Python and libraries"
    )


def main() -> None:
    before = peak_bytes()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=SIZES, default="vocabulary")
    parser.add_argument("--case", choices=("reference",), help="instead of --size")
    parser.add_argument("--vocabulary", type=int, default=151936, help="of --case reference")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", choices=PROGRAMS, help="two updates; prints peak bytes, and those before a model"
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--types", action="store_true", help="float32 and bfloat16")
    parser.add_argument("--shared", type=int, metavar="N", help="responses to every prompt")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_args()
    case = chosen_case(options)
    small = ["optimizer.lr=1e-6", "optimizer.min_lr=0"]  # rounding must not part the programs
    given = [f"rollout.block_size={BLOCK}", *options.overrides]
    config = load_config(None, [*small, *given])
    if options.types:
        compare_types(case, [*small, *given], options.sequences, options.rounds)
    elif options.lengths:
        compare_lengths(case, config, options.lengths, options.rounds)
    elif options.shared:
        compare_sharing(case, config, options.sequences, options.shared, options.rounds)
    elif options.only:
        run, states = PROGRAMS[options.only](case, config), make_states(options.sequences, case)
        run(states)
        run(states)
        print(peak_bytes(), before)
    else:
        compare_programs(options, case, config)


if __name__ == "__main__":
    main()
