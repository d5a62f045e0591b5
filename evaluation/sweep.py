"""Evaluate over decoding settings and checkpoints, to see what speed costs.

    torchrun ... -m evaluation.sweep --models [NAME=]DIR ... --tasks NAME ... --data DIR --out DIR
        [--thresholds P ...] [--steps T ...] [--block-sizes B ...] [decoding flags]

Points: for every model and block size, static decoding in T passes for each of --steps (default:
one token a pass) and dynamic decoding at each of --thresholds (default: none). Every point has a
directory OUT/MODEL/POINT with the files of evaluation.run; a point whose summary.json is there is
not run again, and a point that was killed goes on with the same command. Every point is checked
before the first is run: one that was made with other settings, other data or another model (also
one that was trained further in the same directory) ends the command with what differs. OUT gets
summary.json with all points, report.md and its pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import (
    Loading,
    add_decoding_flags,
    check_model,
    decoding_from,
    loading_from,
)
from evaluation.generation.identity import recorded_settings
from evaluation.jail.sandbox import use_sandbox
from evaluation.report import table, write_report
from evaluation.reporting.results import SUMMARY
from evaluation.run import (
    Tasks,
    add_asking_flags,
    check_asking,
    evaluate,
    finished,
    load_tasks,
    tell_skipped,
)
from evaluation.sample import open_generator
from evaluation.sandbox_flag import add_sandbox_flag
from megatron_opdlm import launcher, written_values
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_place, write_json


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How often and how every point asks."""

    samples: int  # responses to each problem
    enable_thinking: bool


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
        try:
            name, path = written_values.named_path(argument)
        except ValueError as error:
            raise InputError(f"--models {argument} {error}") from error
        directory = Path(path)
        name = name or directory.resolve().name
        if not name or "/" in name or name.startswith("."):
            raise InputError(f"--models {argument}: {name!r} names a directory; use a plain name")
        if name in found:
            raise InputError(f"--models: two are called {name}; give NAME=DIR")
        check_model(directory)
        found[name] = directory
    return found


def check_points(
    model: Path,
    points: Sequence[SweepPoint],
    out: Path,
    tasks: Tasks,
    settings: dict[str, Any],
    asked: Asked,
) -> list[list[dict[str, Any]] | None]:
    """The summary rows of the points that have been run, None for the others. InputError where a
    point's directory holds another evaluation.
    """
    described = {**settings, "model": str(model)}
    # One reading of the data and the model for all points: they differ in their decoding.
    recorded = recorded_settings(tasks, Decoding(), asked.samples, described, asked.enable_thinking)
    return [
        finished(out / point.name, tasks, {**recorded, **point.decoding.asked}) for point in points
    ]


def run_points(
    model: Path,
    points: Sequence[SweepPoint],
    out: Path,
    tasks: Tasks,
    loading: Loading,
    settings: dict[str, Any],
    asked: Asked,
    done: Sequence[list[dict[str, Any]] | None],
) -> Iterator[dict[str, Any]]:
    """The summary rows of one model's points, those in ``done`` as they are; the model is loaded
    when the first of the others needs it.
    """
    generator = None
    for point, rows in zip(points, done, strict=True):
        if rows is None:
            generator = generator or open_generator(model, loading)
            rows, _ = evaluate(
                generator,
                tasks,
                point.decoding,
                asked.samples,
                {**settings, "model": str(model)},
                enable_thinking=asked.enable_thinking,
                out=out / point.name,
                show=True,
            )
            if generator.is_writer:
                print(table(rows).splitlines()[-1], flush=True)
        yield from rows


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument("--models", required=True, nargs="+", metavar="[NAME=]DIR")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[], metavar="P")
    parser.add_argument("--steps", nargs="+", type=int, default=[], metavar="T")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[], metavar="B")
    add_asking_flags(parser)
    add_decoding_flags(parser)
    add_sandbox_flag(parser)
    return parser


def main() -> None:
    args = _parser().parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    check_asking(args)
    use_sandbox(args.sandbox)
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
    settings = {"limit": args.limit, **asdict(loading)}
    asked = Asked(samples=args.samples, enable_thinking=args.enable_thinking)
    done = {  # before anything is written: every rank finds the same
        name: check_points(model, points, args.out / name, tasks, settings, asked)
        for name, model in models.items()
    }
    tell_skipped(tasks)
    rows = [
        row
        for name, model in models.items()
        for row in run_points(
            model, points, args.out / name, tasks, loading, settings, asked, done[name]
        )
    ]
    if launcher.rank() == 0:  # there is no process group where nothing had to be run
        write_json(args.out / SUMMARY, rows)
        write_report([f"{name}={args.out / name}" for name in models], args.out)
        print(table(rows))
        print(f"report: {args.out / 'report.md'}")


if __name__ == "__main__":
    command(main)
