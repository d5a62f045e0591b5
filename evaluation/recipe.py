"""Run an evaluation recipe: a file that says which benchmarks, how long, how decoded, how often.

    torchrun ... -m evaluation.recipe FILE --model DIR --data DIR --out DIR [--limit N] [--dry-run]

A recipe (configs/evaluation/) has ``common`` settings and a list of ``runs``, each with a ``name``,
its ``tasks`` and the settings in which it differs; ``base`` names a file that it extends
(docs/recipes.md). Every run has the files of evaluation.run in OUT/NAME; a run whose summary.json
is there is not run again, so the same command goes on after a kill. Every run is checked before the
first is started: one that was made with other settings, other data or another model (also one
trained further in the same directory) ends the command with what differs.
OUT/summary.json, written last, holds all rows.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import Loading, add_loading_flags, check_model, loading_from
from evaluation.generation.identity import recorded_settings
from evaluation.report import table
from evaluation.reporting.results import SUMMARY
from evaluation.run import evaluate, finished, load_tasks, tell_skipped
from evaluation.sample import open_generator
from evaluation.tasks import get_task
from megatron_opdlm import launcher
from megatron_opdlm.configuration.tree import build_section
from megatron_opdlm.configuration.values import read_with_bases
from megatron_opdlm.diffusion.decoding import NOT_ASKED, Decoding
from megatron_opdlm.errors import Arguments, InputError, command, nearest
from megatron_opdlm.keys import key, keys_of
from megatron_opdlm.model_files.writing import check_place, write_json


@dataclass(frozen=True, kw_only=True)
class _Entry(Decoding):
    """What a file says of a run: how to decode, and what is asked."""

    name: str = key("", "of its directory")
    tasks: list[str] = key([], "names of tasks")
    samples: int = key(1, "responses to each problem", at_least=1)
    enable_thinking: bool = key(False, "thinking flag of the chat template")
    thresholds: list[float] | None = key(
        None, "a run for each, decoded dynamically", at_least=0, at_most=1
    )


_KEYS = [name for name in keys_of(_Entry) if name not in NOT_ASKED]


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """One entry of a recipe: what ``evaluation.run`` would be told."""

    name: str  # of its directory
    tasks: tuple[str, ...]
    decoding: Decoding
    samples: int = 1  # responses a problem
    enable_thinking: bool = False  # flag of the chat template


def read_recipe(path: Path) -> list[RecipeRun]:
    """The runs of a recipe file, ``thresholds`` spread out: those of its base come first, and a run
    of its own replaces the base's of the same name. InputError names file, run and key.
    """
    where = f"evaluation recipe {path}"
    common: dict[str, Any] = {}
    entries: list[Any] = []
    for tree in read_with_bases(path, "evaluation recipe"):
        if set(tree) - {"common", "runs"}:
            raise InputError(f"{where}: needs the keys common and runs, and no others but base")
        own, runs = tree.get("common") or {}, tree.get("runs") or []
        if not isinstance(own, dict) or not isinstance(runs, list):
            raise InputError(f"{where}: common is a mapping and runs a list of at least one run")
        common |= own
        replaced = [_name(run) for run in runs]
        entries = [run for run in entries if _name(run) not in replaced] + runs
    if not entries:
        raise InputError(f"{where}: runs is a list of at least one run")
    runs = [run for entry in entries for run in _runs(where, common, entry)]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{where}: two runs are called {twice}; each needs a name of its own")
    return runs


def _name(entry: Any) -> object:
    """By which a run takes the place of one of the base."""
    return entry.get("name") if isinstance(entry, dict) else None


def _runs(where: str, common: dict[str, Any], entry: Any) -> list[RecipeRun]:
    """An entry over the common settings; a run for each of its ``thresholds``, if it has any."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(f"{where}: every run is a mapping with a name")
    where, values = f"{where}: run {entry['name']}", {**common, **entry}
    for name in values:
        if name not in _KEYS:
            raise InputError(f"{where}: no key {name!r}{nearest(str(name), _KEYS)}")
    found = build_section(_Entry, values, f"{where}: ")
    if not found.name or "/" in found.name or found.name.startswith("."):
        raise InputError(f"{where}: the name is a directory's; use a plain one")
    if not found.tasks:
        raise InputError(f"{where}: tasks must be a list of at least one name")
    run = RecipeRun(
        name=found.name,
        tasks=tuple(found.tasks),
        decoding=Decoding.of(found),
        samples=found.samples,
        enable_thinking=found.enable_thinking,
    )
    if found.thresholds is None:
        return [run]
    dynamic = replace(run.decoding, remasking="low_confidence_dynamic")
    return [
        replace(run, name=f"{run.name}-{t:g}", decoding=replace(dynamic, threshold=t))
        for t in found.thresholds
    ]


def run_recipe(
    runs: Sequence[RecipeRun],
    model: Path,
    data: Path,
    out: Path,
    loading: Loading,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Run what is not finished; all summary rows. The model is loaded once, and only if needed."""
    tasks = {run.name: load_tasks(list(run.tasks), data, limit) for run in runs}
    settings = {"model": str(model), "limit": limit, **asdict(loading)}
    done = {  # before anything is written: every rank finds the same
        run.name: finished(
            out / run.name,
            tasks[run.name],
            recorded_settings(
                tasks[run.name], run.decoding, run.samples, settings, run.enable_thinking
            ),
        )
        for run in runs
    }
    tell_skipped([pair for run in runs if done[run.name] is None for pair in tasks[run.name]])
    generator, rows = None, []
    for run in runs:
        own = done[run.name]
        if own is None:
            generator = generator or open_generator(model, loading)
            own, _ = evaluate(
                generator,
                tasks[run.name],
                run.decoding,
                run.samples,
                settings,
                enable_thinking=run.enable_thinking,
                out=out / run.name,
                show=True,
            )
            if generator.is_writer:
                print(f"{run.name}\n{table(own)}", flush=True)
        rows += own
    return rows


def describe(runs: Sequence[RecipeRun]) -> str:
    """What a recipe would run, a line a run."""
    lines = []
    for run in runs:
        d = run.decoding
        how = f"{d.remasking} {d.threshold:g}" if "dynamic" in d.remasking else d.remasking
        how = "autoregressive" if d.mode == "ar" else f"{how}, {d.denoising_steps} passes"
        thinking = ", thinking" if run.enable_thinking else ""
        drawn = f"temperature {d.temperature:g}" + (f", top-k {d.top_k}" if d.top_k else "")
        lines.append(
            f"{run.name}: {', '.join(run.tasks)}; {d.max_new_tokens} tokens, {drawn}, {how}, "
            f"{run.samples} responses{thinking}"
        )
    return "\n".join(lines)


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs of the recipe")
    parser.add_argument("--limit", type=int, help="first problems of each task only")
    parser.add_argument("--dry-run", action="store_true", help="check the file, show its runs")
    add_loading_flags(parser)
    return parser


def _chosen(runs: list[RecipeRun], only: list[str] | None) -> list[RecipeRun]:
    if only is None:
        return runs
    chosen: dict[str, RecipeRun] = {}
    for name in only:  # of a run with thresholds: one of them, or all by the name in the file
        own = re.compile(rf"{re.escape(name)}(-[\d.]+)?")
        found = {run.name: run for run in runs if own.fullmatch(run.name)}
        if not found:
            names = [run.name for run in runs]
            raise InputError(f"--only {name}: no such run{nearest(name, names)}")
        chosen |= found
    return [run for run in runs if run.name in chosen]


def main() -> None:
    args = _parser().parse_args()
    runs = _chosen(read_recipe(args.recipe), args.only)
    for name in {name for run in runs for name in run.tasks}:
        get_task(name)
    if args.dry_run:
        print(describe(runs))
        return
    for flag in ("model", "data", "out"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag} is needed; see --help")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: a number of problems; use 1 or more")
    check_place(args.out, f"--out {args.out}")
    if args.out.is_file():
        raise InputError(f"--out {args.out}: is a file; give a directory")
    loading = loading_from(args)
    check_model(args.model)
    rows = run_recipe(runs, args.model, args.data, args.out, loading, args.limit)
    if launcher.rank() == 0:  # without work there is no process group to ask
        write_json(args.out / SUMMARY, rows)
        print(table(rows))


if __name__ == "__main__":
    command(main)
