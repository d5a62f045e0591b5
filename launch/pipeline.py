"""From a Hugging Face Qwen3 to the tables of its block-diffusion student, by one command.

    launch/pipeline.sh RECIPE --hf DIR --data DIR --out DIR [--dry-run] [key=value ...]

Stages: import, train, export, evaluate, tables, in OUT/imported, run, exported, evaluation and
report. A stage whose complete output is there is skipped and a killed one goes on, so the same
command finishes what a kill at any point has left. key=value are keys of RECIPE, for instance
data.path=FILE. Exit code 75: training was asked to stop and has saved.
"""

import argparse
import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.jsonl import write_json
from evaluation.recipe import describe as describe_evaluation
from evaluation.recipe import read_recipe
from megatron_opdlm.config import load_config, to_yaml
from megatron_opdlm.errors import STOPPED, Arguments, InputError, RunError, command
from megatron_opdlm.storage.output_paths import check_place

ROOT = Path(__file__).resolve().parents[1]
LOCK_SECONDS = 120  # for the processes of a killed pipeline to be gone
FORMATS = ("a2d-qwen3", "sdar", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line, checked."""

    recipe: Path
    hf: Path
    data: Path
    out: Path
    evaluation: Path
    format: str
    tp: int  # of the evaluation
    limit: int | None
    mask_token_id: int | None
    launcher: list[str]  # starts a module on all ranks
    ranks: int | None
    overrides: list[str]  # key=value of the recipe

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the results: a directory holds those of one such command."""
        config = load_config(self.recipe, self.keys)
        return {
            "hf": str(self.hf.resolve()),
            "data": str(self.data.resolve()),
            "format": self.format,
            "limit": self.limit,
            "mask_token_id": self.mask_token_id,
            "recipe": to_yaml(config),
            "evaluation": self.evaluation.read_text(encoding="utf-8"),
        }

    def training(self, model: Path) -> list[str]:
        """Arguments of the training command."""
        keys = [*self.keys, f"model.path={model}"]
        return ["--config", str(self.recipe), *keys]

    @property
    def keys(self) -> list[str]:
        """Keys of the recipe that the command line decides; --data is that of evaluation in
        training too, unless key=value names another.
        """
        recipe = load_config(self.recipe, self.overrides)
        named = any(pair.startswith("evaluation.data=") for pair in self.overrides)
        data = [] if named or not recipe.evaluation.every else [f"evaluation.data={self.data}"]
        return [*data, *self.overrides, f"train.out={self.out / 'run'}"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline."""

    name: str
    complete: Callable[[], bool]
    command: Callable[[], list[str]]
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], object] = lambda: None


def stages(settings: Settings) -> list[Stage]:
    """Every stage with what tells that its output is whole: names that are only given to that."""
    out, python = settings.out, [sys.executable, "-m"]
    imported, exported = out / "imported", out / "exported"
    trained, tables, partial = out / "trained.json", out / "report", out / ".report"
    mask = ["--mask-token-id", str(settings.mask_token_id)] if settings.mask_token_id else []
    limit = ["--limit", str(settings.limit)] if settings.limit else []

    def import_hf() -> list[str]:
        paths = ["--hf", str(settings.hf), "--out", str(imported)]
        return [*python, "checkpoint_tools.import_hf", *paths, *mask]

    def train() -> list[str]:
        return [*settings.launcher, "megatron_opdlm.train", *settings.training(imported)]

    def export() -> list[str]:
        name = json.loads(trained.read_text())["checkpoint"] if trained.exists() else "LAST"
        checkpoint = out / "run" / "checkpoints" / name
        paths = ["--checkpoint", str(checkpoint), "--out", str(exported)]
        return [*python, "checkpoint_tools.export_hf", *paths, "--format", settings.format]

    def evaluate() -> list[str]:
        paths = ["--model", exported, "--data", settings.data, "--out", out / "evaluation"]
        arguments = [str(settings.evaluation), *map(str, paths), "--tp", str(settings.tp), *limit]
        return [*settings.launcher, "evaluation.recipe", *arguments]

    def report() -> list[str]:
        named = f"{settings.recipe.stem}={out / 'evaluation'}"
        return [*python, "evaluation.report", named, "--out", str(partial)]

    return [
        Stage(name="import", complete=imported.exists, command=import_hf),
        Stage(
            name="train",
            complete=trained.exists,
            command=train,
            finish=lambda: write_json(trained, {"checkpoint": newest(out / "run")}),
        ),
        Stage(name="export", complete=exported.exists, command=export),
        Stage(
            name="evaluate",
            complete=(out / "evaluation" / "summary.json").exists,
            command=evaluate,
        ),
        Stage(
            name="tables",
            complete=tables.exists,
            command=report,
            prepare=lambda: shutil.rmtree(partial, ignore_errors=True),
            finish=lambda: partial.replace(tables),
        ),
    ]


def newest(run: Path) -> str:
    """Name of the last complete checkpoint of a run."""
    names = sorted(path.parent.name for path in run.glob("checkpoints/step_*/manifest.json"))
    if not names:
        raise RunError(f"{run} holds no checkpoint although training ended; see its messages")
    return names[-1]


def run_pipeline(settings: Settings) -> None:
    """Run every stage that is not complete, alone in OUT."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / ".lock").open("w") as lock:
        _only_one(lock, settings.out)
        _same_command(settings)
        for stage in stages(settings):
            if stage.complete():
                print(f"=== {stage.name}: complete, skipped", flush=True)
                continue
            print(f"=== {stage.name}", flush=True)
            stage.prepare()
            _run(stage.name, stage.command(), lock.fileno())
            stage.finish()
    print(f"report: {settings.out / 'report' / 'report.md'}")


def _only_one(lock: Any, out: Path) -> None:
    """Wait until no process of another pipeline in this directory is left."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > end:
                raise InputError(
                    f"--out {out}: another pipeline works there; wait for it, or use another"
                ) from None
            time.sleep(0.2)


def _same_command(settings: Settings) -> None:
    """Note what this directory is of; InputError where it is of something else."""
    path, wanted = settings.out / "pipeline.json", settings.identity
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise InputError(
            f"--out {settings.out} was made by another command, which differs in "
            f"{', '.join(differing)}; repeat that one, or use another directory"
        )


def _run(name: str, argv: list[str], lock: int) -> None:
    """Run a command that ends when we do, and keeps the directory locked until it has ended."""
    print("$ " + shlex.join(argv), flush=True)
    process = subprocess.Popen(argv, cwd=ROOT, pass_fds=(lock,), preexec_fn=_end_with_parent)

    asked = False

    def hand_on(_signal: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    code = process.wait()
    if code == STOPPED or (asked and code):  # torchrun ends with 1 whatever its ranks end with
        print(f"stage {name} was asked to stop; the same command goes on", flush=True)
        sys.exit(STOPPED)
    if code:
        raise RunError(f"stage {name} ended with code {code}; the same command goes on from there")


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent dies (Linux's prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def show(settings: Settings) -> str:
    """What would be done: the layout, the evaluation's runs and the commands; writes nothing."""
    from megatron_opdlm.dry_run import describe

    keys = settings.training(settings.hf)[2:]
    if settings.mask_token_id:
        keys.append(f"model.mask_token_id={settings.mask_token_id}")
    config = load_config(settings.recipe, keys)
    lines = [describe(config, settings.ranks or 1), "", "evaluation"]
    lines += [describe_evaluation(read_recipe(settings.evaluation)), ""]
    for stage in stages(settings):
        done = " (complete, skipped)" if stage.complete() else ""
        lines += [f"{stage.name}{done}", f"  {shlex.join(stage.command())}"]
    return "\n".join(lines)


def _parser() -> Arguments:
    parser = Arguments(
        prog="launch/pipeline.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="training recipe, e.g. configs/opdlm_8b.yaml")
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face Qwen3 directory")
    add("--data", type=Path, required=True, metavar="DIR", help="data files of the benchmarks")
    add("--out", type=Path, required=True, metavar="DIR", help="new, or one to go on with")
    add("--evaluation", type=Path, metavar="FILE", help="default: configs/evaluation/RECIPE's name")
    add("--format", choices=FORMATS, default="a2d-qwen3", help="of the export")
    add("--ranks", type=int, help="of training and evaluation (default: the GPUs here, else 1)")
    add("--tp", type=int, default=1, help="tensor-parallel ranks of the evaluation")
    add("--limit", type=int, help="first problems of each benchmark only")
    add("--mask-token-id", type=int, help="where the tokenizer has no mask and 151669 no room")
    add("--dry-run", action="store_true", help="check and show everything, write nothing")
    add("overrides", nargs="*", metavar="key=value", help="keys of RECIPE")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    evaluation = args.evaluation or ROOT / "configs" / "evaluation" / args.recipe.name
    load_config(args.recipe, args.overrides)
    read_recipe(evaluation)
    if not args.dry_run:
        for flag, path in (("--hf", args.hf), ("--data", args.data)):
            if not path.is_dir():
                raise InputError(f"{flag} {path}: no such directory; check the path")
    check_place(args.out, f"--out {args.out}")
    if args.out.is_file():
        raise InputError(f"--out {args.out}: is a file; give a directory")
    launcher = shlex.split(os.environ.get("OPDLM_LAUNCHER", str(ROOT / "launch" / "one_node.sh")))
    if args.ranks is not None:
        launcher += ["--ranks", str(args.ranks)]
    return Settings(
        recipe=args.recipe,
        hf=args.hf,
        data=args.data,
        out=args.out,
        evaluation=evaluation,
        format=args.format,
        tp=args.tp,
        limit=args.limit,
        mask_token_id=args.mask_token_id,
        launcher=launcher,
        ranks=args.ranks,
        overrides=args.overrides,
    )


def main() -> None:
    args = _parser().parse_intermixed_args()
    settings = _settings(args)
    if args.dry_run:
        print(show(settings))
    else:
        run_pipeline(settings)


if __name__ == "__main__":
    command(main)
