"""Run an evaluation recipe: a file that says which benchmarks, how long, how decoded, how often.

    torchrun ... -m evaluation.recipe FILE --model DIR --data DIR --out DIR [--limit N] [--dry-run]

A recipe (configs/evaluation/) has ``common`` settings and a list of ``runs``, each with a ``name``,
its ``tasks`` and the settings in which it differs (docs/recipes.md). Every run has the files of
evaluation.run in OUT/NAME; a run whose summary.json is there is not run again, so the same command
goes on after a kill. Every run is checked before the first is started: one that was made with other
settings, other data or another model (also one trained further in the same directory) ends the
command with what differs. OUT/summary.json, written last, holds all rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from evaluation.decoding_flags import Loading, add_loading_flags, check_model, loading_from
from evaluation.generation.identity import recorded_settings
from evaluation.report import table
from evaluation.reporting.results import SUMMARY
from evaluation.run import evaluate, finished, load_tasks, tell_skipped
from evaluation.sample import open_generator
from evaluation.tasks import get_task
from megatron_opdlm import launcher
from megatron_opdlm.configuration import yaml_text
from megatron_opdlm.diffusion.decoding import ASKED, Decoding
from megatron_opdlm.errors import Arguments, InputError, command, nearest
from megatron_opdlm.model_files.writing import check_place, write_json

_OWN = ("name", "tasks", "samples", "enable_thinking", "thresholds")
_DEFAULTS = Decoding()


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """One entry of a recipe: what ``evaluation.run`` would be told."""

    name: str  # of its directory
    tasks: tuple[str, ...]
    decoding: Decoding
    samples: int = 1  # responses a problem
    enable_thinking: bool = False  # flag of the chat template


def read_recipe(path: Path) -> list[RecipeRun]:
    """The runs of a recipe file, ``thresholds`` spread out. InputError names file, run and key."""
    where = f"evaluation recipe {path}"
    if not path.is_file():
        raise InputError(f"{where}: no such file; configs/evaluation/ holds ready ones")
    try:
        text = path.read_text(encoding="utf-8")
        yaml_text.check(text)
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: "2001-99-99" and the like
        raise InputError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(tree, dict) or set(tree) - {"common", "runs"}:
        raise InputError(f"{where}: needs the keys common and runs, and no others")
    common, entries = tree.get("common") or {}, tree.get("runs")
    if not isinstance(common, dict) or not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: common is a mapping and runs a list of at least one run")
    runs = [run for entry in entries for run in _runs(where, common, entry)]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{where}: two runs are called {twice}; each needs a name of its own")
    return runs


def _runs(where: str, common: dict[str, Any], entry: Any) -> list[RecipeRun]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(f"{where}: every run is a mapping with a name")
    name = entry["name"]
    where = f"{where}: run {name}"
    if not name or "/" in name or name.startswith("."):
        raise InputError(f"{where}: the name is a directory's; use a plain one")
    values = {**common, **entry}
    for key in values:
        if key not in (*ASKED, *_OWN):
            raise InputError(f"{where}: no key {key!r}{nearest(str(key), (*ASKED, *_OWN))}")
    tasks = values.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, str) for t in tasks):
        raise InputError(f"{where}: tasks must be a list of at least one name")
    thinking = _typed(where, values, "enable_thinking", False)
    samples = _typed(where, values, "samples", 1)
    if samples < 1:
        raise InputError(f"{where}: samples={samples}: use 1 or more")
    decoding = _decoding(where, values)
    run = RecipeRun(
        name=name,
        tasks=tuple(tasks),
        decoding=decoding,
        samples=samples,
        enable_thinking=thinking,
    )
    return _spread(where, run, values.get("thresholds"))


def _decoding(where: str, values: Mapping[str, Any]) -> Decoding:
    given = {
        key: _typed(where, values, key, getattr(_DEFAULTS, key)) for key in ASKED if key in values
    }
    try:
        return replace(_DEFAULTS, **given).validate()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _typed(where: str, values: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of the default's type; an integer may stand for a float."""
    value = values.get(key, default)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise InputError(f"{where}: {key}={value!r} must be like {default!r}; correct it")
    return value


def _spread(where: str, run: RecipeRun, thresholds: Any) -> list[RecipeRun]:
    """A run for each of ``thresholds``, decoded dynamically; without them the run itself."""
    if thresholds is None:
        return [run]
    if not isinstance(thresholds, list) or not all(type(t) in (int, float) for t in thresholds):
        raise InputError(f"{where}: thresholds must be a list of probabilities")
    runs = []
    for threshold in thresholds:
        how = {"remasking": "low_confidence_dynamic", "threshold": float(threshold)}
        decoding = _decoding(where, {**asdict(run.decoding), **how})
        runs.append(replace(run, name=f"{run.name}-{threshold:g}", decoding=decoding))
    return runs


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
        lines.append(
            f"{run.name}: {', '.join(run.tasks)}; {d.max_new_tokens} tokens, temperature "
            f"{d.temperature:g}, {how}, {run.samples} responses{thinking}"
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
    names = [run.name for run in runs]
    for name in only or []:
        if name not in names:
            raise InputError(f"--only {name}: no such run{nearest(name, names)}")
    return [run for run in runs if only is None or run.name in only]


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
