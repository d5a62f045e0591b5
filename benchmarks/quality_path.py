"""Which way makes the best student of the same trained tokens: warm up, distil, or both in turn?

    python -m benchmarks.quality_path --out DIR [--tokens N] [--seeds N ...] [--blocks N ...]
        [--ways WAY ...]
    python -m benchmarks.quality_path --out DIR --tables

On the quickstart's toy; teacher, answers and students are made anew for each seed. A way is a
recipe with ``stages`` over configs/tiny_cpu.yaml (written to DIR/recipes), trained in this one
process with one thread; its stages share one cosine of the learning rate. Students are asked all
held-out problems at one token a pass and dynamically. What is finished is not done again.
--tables prints what is there, as docs/claims.md shows it; CPU seconds are the process's own.
"""

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from launch.quickstart import task
from launch.quickstart.teacher import MASK_ROW
from launch.stages import ROOT, Stages, checkpoints, python
from megatron_opdlm.config import load_config, path_override, stages_of
from megatron_opdlm.diffusion.decoding import Decoding, Remasking
from megatron_opdlm.errors import Arguments, InputError, command, nearest
from megatron_opdlm.model_files.writing import write_json, write_text

BASE = ROOT / "configs" / "tiny_cpu.yaml"
STEP_TOKENS = 128 * 21.4  # sequences of a step, and their mean length once they are the teacher's
YOUNG_STEPS = 4  # more for rollouts of an untrained student: they begin at 8 tokens, not at 24
DECODINGS: dict[str, tuple[Remasking, float]] = {  # name -> remasking, threshold
    "static": ("low_confidence_static", 0.9),
    "dynamic 0.9": ("low_confidence_dynamic", 0.9),
    "dynamic 0.7": ("low_confidence_dynamic", 0.7),
}
Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A training of a way: a share of the tokens, in blocks of the way's size unless it says."""

    kind: str
    share: float
    block: int | None = None
    keys: Mapping[str, Tree] = field(default_factory=dict)


def _warm(share: float, block: int | None = None, **keys: Tree) -> Part:
    return Part(kind="warm_up", share=share, block=block, keys=keys)


def _distil(share: float, block: int | None = None, **keys: Tree) -> Part:
    return Part(kind="distil", share=share, block=block, keys=keys)


WAYS: dict[str, tuple[Part, ...]] = {
    "warm up": (_warm(1),),
    "distil": (_distil(1),),
    "warm up, distil": (_warm(1 / 4), _distil(3 / 4)),
    "distil, grown": tuple(_distil(1 / 3, block) for block in (4, 8, 16)),
    "warm up, distil, grown": (_warm(1 / 4, 4), *(_distil(1 / 4, b) for b in (4, 8, 16))),
    "distil, random masks": (_distil(1, states={"mode": "random_mask"}),),
    "warm up, NLL": (_warm(1, loss={"kind": "nll"}),),
}
GROWN = 16  # the block size of the ways that grow to it
COMPARED = (  # way, the one it is held against, block sizes
    ("warm up, distil", "warm up", (4, 8, 16)),
    ("warm up, distil", "distil", (4, 8, 16)),
    ("distil", "warm up", (4, 8, 16)),
    ("warm up", "warm up, NLL", (4, 8, 16)),
    ("distil", "distil, random masks", (4, 8, 16)),
    ("distil, grown", "distil", (16,)),
    ("warm up, distil, grown", "warm up, distil", (16,)),
)


def recipe(parts: Sequence[Part], block: int, tokens: int) -> Tree:
    """The recipe of a way."""
    stages: list[Tree] = []
    done = 0.0  # share of the tokens
    if any(part.kind == "warm_up" for part in parts):
        stages.append({"kind": "answer"})
    for i, part in enumerate(parts):
        young = i == 0 and part.kind == "distil"
        size = part.block or block
        keys: dict[str, Any] = {
            "train": {"steps": round(part.share * tokens / STEP_TOKENS) + YOUNG_STEPS * young},
            "rollout": {"block_size": size, "denoising_steps": size},
            "optimizer": {"lr": _rate(done), "min_lr": _rate(done + part.share)},
            **part.keys,
        }
        done += part.share
        if not young:
            keys["curriculum"] = {"kind": "constant"}
        stages.append({"kind": part.kind, "name": f"{i + 1}-{part.kind}-{size}", **keys})
    rollout = {"remasking": "low_confidence_dynamic", "threshold": 0.9}
    return {
        "base": str(BASE),
        "rollout": rollout,
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 1000},
        "stages": stages,
    }


def _rate(done: float) -> float:
    """The learning rate of a single run's cosine after this share of it."""
    o = load_config(BASE, []).optimizer
    return o.min_lr + (o.lr - o.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


@dataclass(frozen=True, kw_only=True)
class Seed:
    """What all ways of a seed share."""

    number: int
    directory: Path
    data: Path

    @property
    def imported(self) -> Path:
        return self.directory / "imported"

    @property
    def answers(self) -> Path:
        return self.directory / "answers.jsonl"

    def prepare(self, stages: Stages) -> None:
        """Teacher, its checkpoint and its answers."""
        teacher, number = self.directory / "teacher", str(self.number)
        imported = str(self.imported)
        mask, asked = ("--mask-token-id", str(MASK_ROW)), ("--temperature", "1", "--seed", number)
        limit = ("--max-new-tokens", str(task.MAX_RESPONSE_TOKENS + 1))
        prompts = ("--prompts", str(self.data / task.FILES["train"]))
        made = (
            (teacher, "launch.quickstart.teacher", ("--seed", number)),
            (self.imported, "checkpoint_tools.import_hf", ("--hf", str(teacher), *mask)),
            (self.answers, "evaluation.answer", ("--model", imported, *prompts, *asked, *limit)),
        )
        for output, module, arguments in made:
            if not output.exists():
                argv = python(module, "--out", str(output), *arguments)
                print(stages.run(f"{output.name}-{number}", argv), flush=True)


def _file_name(way: str, block: int, tokens: int) -> str:
    return f"{way.replace(', ', '-').replace(' ', '_')}-{block}-{tokens}"


def walk(seed: Seed, way: str, block: int, tokens: int, out: Path) -> Tree:
    """Train a way to its end and ask the student: what docs/claims.md needs of it."""
    from megatron_opdlm import train

    name = _file_name(way, block, tokens)
    file = out / "recipes" / f"{name}.yaml"
    write_text(file, yaml.safe_dump(recipe(WAYS[way], block, tokens), sort_keys=False))
    start, trained, model = time.process_time(), 0, seed.imported
    for stage in (stage for stage in stages_of(file) if stage.trains):
        run = seed.directory / name / stage.name
        prompts = seed.answers if stage.kind == "warm_up" else seed.data / task.FILES["train"]
        teacher = stage.keys.get("loss", {}).get("kind") != "nll"
        config = load_config(
            file,
            [
                path_override("model.path", model),
                *([path_override("teacher.path", seed.imported)] if teacher else []),
                path_override("data.path", prompts),
                path_override("train.out", run),
                f"train.seed={100 * seed.number}",  # a stage adds its place
            ],
            stage.name,
        )
        train.run(config)
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        trained += json.loads(rows[-1])["cumulative_trained_tokens"]
        model = checkpoints(run)[-1]
    seconds = time.process_time() - start
    return {
        "way": way,
        "block": block,
        "tokens": tokens,
        "seed": seed.number,
        "trained_tokens": trained,
        "cpu_seconds": seconds,
        "decodings": ask(model, block, seed.data),
    }


def ask(model: Path, block: int, data: Path) -> dict[str, Tree]:
    """Accuracy and tokens a pass of every decoding, on the held-out problems."""
    from evaluation.decoding_flags import Loading
    from evaluation.run import evaluate, load_tasks
    from evaluation.sample import open_generator

    tasks, generator = load_tasks(["addition"], data, None), open_generator(model, Loading())
    found = {}
    for name, (remasking, threshold) in DECODINGS.items():
        decoding = Decoding(
            block_size=block,
            denoising_steps=block,
            remasking=remasking,
            threshold=threshold,
            max_new_tokens=task.MAX_RESPONSE_TOKENS + 1,
        )
        (row,), _ = evaluate(generator, tasks, decoding, 1, {})
        found[name] = {key: row[key] for key in ("n", "accuracy", "tokens_per_denoising_step")}
    return found


def run_all(
    out: Path, seeds: Sequence[int], blocks: Sequence[int], ways: Sequence[str], tokens: int
) -> None:
    """These ways at every block size and seed, as far as it is not done."""
    import torch

    torch.set_num_threads(1)
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    stages, data = Stages(logs=out / "logs"), out / "data"
    task.write_data(data)
    found = []
    for number in seeds:
        seed = Seed(number=number, directory=out / f"seed-{number}", data=data)
        seed.directory.mkdir(exist_ok=True)
        seed.prepare(stages)
        found.append(seed)
    (out / "results").mkdir(exist_ok=True)
    for block, way in product(blocks, ways):
        if "grown" in way and block != GROWN:
            continue
        for seed in found:
            result = out / "results" / f"{_file_name(way, block, tokens)}-{seed.number}.json"
            if not result.exists():
                write_json(result, walk(seed, way, block, tokens, out))
                print(f"done: {result.stem}", flush=True)


def tables(results: Iterable[Tree]) -> str:
    """Accuracies of every way, then differences between ways, seed by seed, in points."""
    found = {(r["tokens"], r["block"], r["way"], r["seed"]): r for r in results}
    lines = []
    for tokens in sorted({key[0] for key in found}):
        lines += [f"{tokens:,} trained tokens", "", *_accuracies(found, tokens), ""]
        lines += [*_differences(found, tokens), ""]
    total = sum(r["cpu_seconds"] for r in found.values()) / 60
    return "\n".join([*lines, f"training of {len(found)} students: {total:.0f} CPU minutes"])


Found = Mapping[tuple[int, int, str, int], Tree]


def _accuracies(found: Found, tokens: int) -> list[str]:
    lines = [
        "| block | way | seeds | trained tokens | " + " | ".join(DECODINGS) + " |",
        "|---|---|---|---|" + "---|" * len(DECODINGS),
    ]
    for block in sorted({key[1] for key in found}):
        for way in WAYS:
            runs = [r for key, r in found.items() if key[:3] == (tokens, block, way)]
            if not runs:
                continue
            cells = []
            for name in DECODINGS:
                accuracies = [100 * r["decodings"][name]["accuracy"] for r in runs]
                speeds = [r["decodings"][name]["tokens_per_denoising_step"] for r in runs]
                speed = f" at {statistics.mean(speeds):.2f}" if "dynamic" in name else ""
                cells.append(f"{_spread(accuracies)}{speed}")
            trained = statistics.mean(r["trained_tokens"] for r in runs)
            lines.append(
                f"| {block} | {way} | {len(runs)} | {trained:,.0f} | " + " | ".join(cells) + " |"
            )
    return lines


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _differences(found: Found, tokens: int) -> list[str]:
    names = ("static", "dynamic 0.9")
    lines = [
        "| block | way | against | "
        + " | ".join(f"{n}: difference, by seed" for n in names)
        + " |",
        "|---|---|---|---|---|",
    ]
    for way, other, blocks in COMPARED:
        for block in blocks:
            seeds = sorted(
                key[3]
                for key in found
                if key[:3] == (tokens, block, way) and (tokens, block, other, key[3]) in found
            )
            if not seeds:
                continue
            cells = []
            for name in names:
                values = [
                    100 * _accuracy(found, tokens, block, way, seed, name)
                    - 100 * _accuracy(found, tokens, block, other, seed, name)
                    for seed in seeds
                ]
                each = ", ".join(f"{value:+.1f}" for value in values)
                cells.append(f"{statistics.mean(values):+.1f} ({each})")
            lines.append(f"| {block} | {way} | {other} | " + " | ".join(cells) + " |")
    return lines


def _accuracy(found: Found, tokens: int, block: int, way: str, seed: int, decoding: str) -> float:
    return found[tokens, block, way, seed]["decodings"][decoding]["accuracy"]


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16], help="tokens")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--tokens", type=int, default=130_000, help="trained, of every student")
    parser.add_argument("--tables", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    for way in args.ways:
        if way not in WAYS:
            raise InputError(f"--ways {way}: no such way{nearest(way, WAYS)}")
    if not args.tables:
        run_all(args.out.resolve(), args.seeds, args.blocks, args.ways, args.tokens)
    files = sorted((args.out / "results").glob("*.json"))
    if not files:
        raise InputError(f"--out {args.out}: no result is there; run it without --tables")
    print(tables(json.loads(file.read_text(encoding="utf-8")) for file in files))


if __name__ == "__main__":
    command(main)
