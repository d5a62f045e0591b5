"""Evaluate over decoding settings and checkpoints, to see what speed costs.

    torchrun ... -m evaluation.sweep --models [NAME=]DIR ... --tasks NAME ... --data DIR --out DIR
        [--thresholds P ...] [--steps T ...] [--block-sizes B ...] [decoding flags]

Points: for every model and block size, static decoding in T passes for each of --steps (default:
one token a pass) and dynamic decoding at each of --thresholds (default: none). Every point has a
directory OUT/MODEL/POINT with the files of evaluation.run; a point whose summary.json is there is
not run again, and a point that was killed goes on with the same command. OUT gets summary.json with
all points, report.md and its pictures.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import (
    add_decoding_flags,
    check_model,
    decoding_from,
    loading_from,
)
from evaluation.jsonl import write_json
from evaluation.report import table, write_report
from evaluation.reporting.results import SUMMARY, read_summary
from evaluation.run import evaluate, load_tasks
from evaluation.sample import open_generator
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.storage.output_paths import check_place


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One decoding setting and the name of its directory."""

    name: str
    decoding: Decoding


def sweep_points(
    decoding: Decoding,
    *,
    block_sizes: Sequence[int],
    steps: Sequence[int],
    thresholds: Sequence[float],
) -> list[SweepPoint]:
    """Every point of the grid; ``steps`` and ``thresholds`` empty: one token a pass.

    Dynamic decoding gets as many passes as a block has tokens, so that the threshold alone decides.
    """
    points = []
    for size in block_sizes:
        for passes in steps or ([] if thresholds else [size]):
            how = {"remasking": "low_confidence_static", "denoising_steps": passes}
            points.append((f"block{size}-static-{passes}", size, how))
        for threshold in thresholds:
            how = {
                "remasking": "low_confidence_dynamic",
                "denoising_steps": size,
                "threshold": threshold,
            }
            points.append((f"block{size}-dynamic-{threshold:g}", size, how))
    return [
        SweepPoint(name=name, decoding=replace(decoding, block_size=size, **how).validate())
        for name, size, how in points
    ]


def models_by_name(arguments: Sequence[str]) -> dict[str, Path]:
    """``[NAME=]DIR`` -> directories by name, which is the directory's own by default."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        directory = Path(path if separator else argument)
        name = name if separator else directory.resolve().name
        if not name or "/" in name or name.startswith("."):
            raise InputError(f"--models {argument}: {name!r} names a directory; use a plain name")
        if name in found:
            raise InputError(f"--models: two are called {name}; give NAME=DIR")
        check_model(directory)
        found[name] = directory
    return found


def finished(directory: Path, wanted: dict[str, Any], tasks: Sequence[str]) -> list[dict] | None:
    """The rows of a point that has been run, None where it has not. InputError where the directory
    holds another evaluation.
    """
    if not (directory / SUMMARY).is_file():
        return None
    rows = read_summary(directory / SUMMARY)
    found = {key: rows[0]["settings"].get(key) for key in wanted} if rows else {}
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing or [row["task"] for row in rows] != list(tasks):
        what = ", ".join(differing) or "tasks"
        raise InputError(f"{directory} holds an evaluation that differs in {what}; use another out")
    return rows


def run_points(
    model: Path, points: Sequence[SweepPoint], out: Path, tasks: list, loading: Any, settings: dict
) -> Iterator[dict[str, Any]]:
    """The summary rows of one model's points, each run unless its results are there; the model is
    loaded when the first point needs it.
    """
    generator = None
    responses = settings["responses_per_prompt"]
    for point in points:
        wanted = {**settings, "model": str(model), **_comparable(point.decoding)}
        rows = finished(out / point.name, wanted, [task.name for task, _ in tasks])
        if rows is None:
            generator = generator or open_generator(model, loading)
            described = {**settings, "model": str(model), **asdict(loading)}
            place = out / point.name
            rows, _ = evaluate(
                generator, tasks, point.decoding, responses, described, out=place, show=True
            )
            if generator.is_writer:
                print(table(rows).splitlines()[-1], flush=True)
        yield from rows


def _comparable(decoding: Decoding) -> dict[str, Any]:
    """The settings that a point asks for; the shift is the model's own."""
    return {key: value for key, value in asdict(decoding).items() if key != "logit_shift"}


def _parser() -> Arguments:
    parser = Arguments(
        prog="python -m evaluation.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", required=True, nargs="+", metavar="[NAME=]DIR")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[], metavar="P")
    parser.add_argument("--steps", nargs="+", type=int, default=[], metavar="T")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[], metavar="B")
    parser.add_argument("--limit", type=int, default=None, help="first problems of each task only")
    parser.add_argument("--responses-per-prompt", type=int, default=1)
    add_decoding_flags(parser)
    return parser


def main() -> None:
    args = _parser().parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    points = sweep_points(
        decoding,
        block_sizes=args.block_sizes or [decoding.block_size],
        steps=args.steps,
        thresholds=args.thresholds,
    )
    models = models_by_name(args.models)
    check_place(args.out, f"--out {args.out}")
    if args.out.is_file():
        raise InputError(f"--out {args.out}: is a file; give a directory")
    tasks = load_tasks(args.tasks, args.data, args.limit)
    settings = {"limit": args.limit, "responses_per_prompt": args.responses_per_prompt}
    rows = [
        row
        for name, model in models.items()
        for row in run_points(model, points, args.out / name, tasks, loading, settings)
    ]
    if os.environ.get("RANK", "0") == "0":  # there is no process group where nothing had to be run
        write_json(args.out / SUMMARY, rows)
        write_report([f"{name}={args.out / name}" for name in models], args.out)
        print(table(rows))
        print(f"report: {args.out / 'report.md'}")


if __name__ == "__main__":
    command(main)
