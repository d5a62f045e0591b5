"""The quickstart: teacher, import, train (stopped once and resumed), export, evaluate, report.

launch/quickstart.sh sets the environment up and calls this. With --hf DIR the teacher is the user's
own model directory.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.tasks import get_task
from launch.quickstart import task
from launch.stages import Stages, checkpoints, python, stop, torchrun
from megatron_opdlm.config import load_config, path_override
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.manifest import HUGGINGFACE
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.model_files.writing import check_new_directory, write_json

CONFIG = Path("configs/tiny_cpu.yaml")
RANKS = 2
LAYOUTS = {"dp2": 1, "tp2": 2}  # name -> tensor-parallel ranks
THRESHOLDS = (0.8, 0.9, 0.95)  # dynamic decoding


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asks for."""

    out: Path
    seed: int
    layout: str
    hf: Path | None  # the user's own model directory; None: train the toy teacher
    data: Path | None  # the user's training prompts
    test: Path | None  # the user's held-out rows for exact match
    config: Path
    mask_token_id: int | None
    overrides: list[str]  # key=value, handed to training
    block_size: int  # tokens, of the training configuration
    max_new_tokens: int  # response tokens in evaluations


def main() -> None:
    settings = _settings(_parser().parse_args())
    settings.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    stages = Stages(logs=settings.out / "logs")
    stages.seconds["setup"] = float(os.environ.get("OPDLM_SETUP_SECONDS", "0"))
    record: dict[str, Any] = {
        "seed": settings.seed,
        "layout": settings.layout,
        "teacher": str(settings.hf) if settings.hf else "toy",
        "block_size": settings.block_size,
    }
    teacher = _teacher(settings, stages)
    imported = _import(settings, stages, teacher)
    record |= _train(settings, stages, imported)
    saved = checkpoints(settings.out / "run")
    student = _export(settings, stages, saved[-1])
    record |= _evaluate(settings, stages, teacher, imported, student, saved)
    record["seconds"] = stages.seconds | {
        "total": stages.seconds["setup"] + time.monotonic() - start
    }
    write_json(settings.out / "quickstart.json", record)
    print("\n=== report", flush=True)
    from launch.quickstart.report import report

    print(report(settings.out))


def _teacher(settings: Settings, stages: Stages) -> Path:
    """(a) Data and teacher. Returns the teacher's Hugging Face directory."""
    out, seed = settings.out, str(settings.seed)
    with stages.stage("teacher", "a) the teacher: an ordinary Hugging Face Qwen3"):
        if settings.data is None or settings.test is None:
            print(stages.run("data", python("launch.quickstart.task", "--out", str(out / "data"))))
        if settings.hf:
            print(f"teacher: {settings.hf}")
            return settings.hf
        arguments = ("--out", str(out / "teacher"), "--seed", seed)
        print(stages.run("teacher", python("launch.quickstart.teacher", *arguments)))
    return out / "teacher"


def _import(settings: Settings, stages: Stages, teacher: Path) -> Path:
    """(b) Hugging Face -> Megatron checkpoint."""
    imported = settings.out / "imported"
    arguments = ["--hf", str(teacher), "--out", str(imported)]
    if settings.mask_token_id is not None:
        arguments += ["--mask-token-id", str(settings.mask_token_id)]
    with stages.stage("import", "b) import into a Megatron checkpoint"):
        print(stages.run("import", python("checkpoint_tools.import_hf", *arguments)))
    return imported


def _train(settings: Settings, stages: Stages, imported: Path) -> dict[str, Any]:
    """(c) Train to the first checkpoint, kill; (d) the same command again resumes."""
    run = settings.out / "run"
    argv = torchrun(
        RANKS,
        "megatron_opdlm.train",
        *("--config", str(settings.config)),
        path_override("model.path", imported),
        f"model.tensor_parallel={LAYOUTS[settings.layout]}",
        path_override("data.path", settings.data or settings.out / "data" / task.FILES["train"]),
        f"train.seed={settings.seed}",
        path_override("train.out", run),
        *settings.overrides,
    )
    with stages.stage("train", f"c) on-policy distillation, {RANKS} ranks, {settings.layout}"):
        process = stages.start("train", argv, on_terminal=True)
        while not checkpoints(run) and process.poll() is None:
            time.sleep(0.1)
        if process.poll() is not None:
            raise _ended_early(process.returncode)
        stop(process)
        stopped_after = checkpoints(run)[-1].name
    with stages.stage("train", f"d) killed after {stopped_after}: the same command resumes"):
        process = stages.start("train", argv, on_terminal=True)
        if process.wait():
            raise stages.failure("train", process.returncode)
    return {"stopped_after": stopped_after, "finished_at": checkpoints(run)[-1].name}


def _ended_early(code: int) -> RunError:
    if code:
        return RunError(f"training ended with code {code} before its first checkpoint; see above")
    return RunError(
        "training ended before it could be stopped and resumed; use a smaller checkpoint.every"
    )


def _export(settings: Settings, stages: Stages, checkpoint: Path) -> Path:
    """(e) Megatron checkpoint -> Hugging Face directory."""
    student = settings.out / "student"
    family = read_shape(checkpoint / HUGGINGFACE).family
    given = ("--checkpoint", str(checkpoint), "--out", str(student))
    arguments = (*given, "--format", family.block_diffusion.format)
    with stages.stage("export", "e) export to Hugging Face"):
        print(stages.run("export", python("checkpoint_tools.export_hf", *arguments)))
    return student


def _evaluate(
    settings: Settings,
    stages: Stages,
    teacher: Path,
    imported: Path,
    student: Path,
    saved: list[Path],
) -> dict[str, Any]:
    """(f) Teacher, untrained student, trained student at several speeds, and the way between."""
    name, data = "addition", settings.out / "data"
    if settings.test:
        name, data = f"exact_match:{settings.test.stem}", settings.test.parent
    block_size, limit = settings.block_size, {"max_new_tokens": settings.max_new_tokens}
    static = {"block_size": block_size, "remasking": "low_confidence_static", **limit}
    one_token = {**static, "denoising_steps": block_size}

    def entry(name: str, model: Path, decoding: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "model": str(model), "decoding": decoding}

    entries = [
        entry("teacher", teacher, {"mode": "ar", **limit}),
        entry("initial", imported, one_token),
        *(entry(f"curve_{path.name}", path, one_token) for path in saved[:-1]),
        *(
            entry(f"static_{k}", student, {**static, "denoising_steps": -(-block_size // k)})
            for k in (1, 2, 4)
        ),
        *(
            entry(
                f"dynamic_{threshold:g}",
                student,
                {**one_token, "remasking": "low_confidence_dynamic", "threshold": threshold},
            )
            for threshold in THRESHOLDS
        ),
    ]
    plan = settings.out / "evaluation_plan.json"
    out = settings.out / "evaluation"
    write_json(plan, {"task": name, "data": str(data), "out": str(out), "evaluations": entries})
    with stages.stage("evaluate", f"f) evaluate: {len(entries)} evaluations of {name}"):
        stages.run("evaluate", torchrun(RANKS, "launch.quickstart.evaluate", "--plan", str(plan)))
    return {"task": name, "evaluated": [entry["name"] for entry in entries]}


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="new directory (default: runs/quickstart, -2, ...)"
    )
    parser.add_argument("--layout", default="dp2", metavar="|".join(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    own = parser.add_argument_group("your own model")
    own.add_argument("--hf", type=Path, metavar="DIR", help="model directory, the teacher")
    own.add_argument(
        "--data", type=Path, metavar="FILE", help="training prompts (default: the toy task's)"
    )
    own.add_argument(
        "--test", type=Path, metavar="FILE.jsonl", help="rows for exact match (default: the toy's)"
    )
    own.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    own.add_argument("--mask-token-id", type=int, help="where the tokenizer has no mask token")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration for training"
    )
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    """Check the command line; relative paths are relative to the repository's root."""
    if args.layout not in LAYOUTS:
        raise InputError(f"--layout {args.layout}: not known; use {' or '.join(LAYOUTS)}")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: use 0 or more")
    if args.hf is None and (args.data or args.test):
        raise InputError("--data and --test go with --hf DIR; leave them out for the toy teacher")
    for flag, path, is_right in (
        ("--hf", args.hf, Path.is_dir),
        ("--data", args.data, Path.exists),
        ("--test", args.test, Path.is_file),
        ("--config", args.config, Path.is_file),
    ):
        if path is not None and not is_right(path):
            raise InputError(f"{flag} {path}: no such file or directory; check the path")
    if args.hf is not None:
        read_shape(args.hf)
    if args.test is not None:
        if args.test.suffix != ".jsonl":
            raise InputError(f"--test {args.test}: a name that ends in .jsonl is needed; rename it")
        get_task(f"exact_match:{args.test.stem}").load(args.test.parent)
    for override in args.overrides:
        if "=" not in override:
            raise InputError(f"{override!r}: not understood; use key=value, or see --help")
    out = args.out or _free_directory(Path("runs/quickstart"))
    check_new_directory(out, "--out")
    rollout = load_config(args.config, args.overrides).rollout  # bad keys are found now
    mask = args.mask_token_id
    if args.hf is None and mask is None:
        from launch.quickstart.teacher import MASK_ROW

        mask = MASK_ROW
    return Settings(
        out=out.resolve(),
        seed=args.seed,
        layout=args.layout,
        hf=args.hf.resolve() if args.hf else None,
        data=args.data.resolve() if args.data else None,
        test=args.test.resolve() if args.test else None,
        config=args.config.resolve(),
        mask_token_id=mask,
        overrides=args.overrides,
        block_size=rollout.block_size,
        max_new_tokens=rollout.max_new_tokens if args.hf else task.MAX_RESPONSE_TOKENS,
    )


def _free_directory(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``, ... when there is something already."""
    number, path = 2, wanted
    while path.exists():
        path, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return path


if __name__ == "__main__":
    command(main)
