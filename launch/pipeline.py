"""From a Hugging Face model to the tables of its block-diffusion student, by one command.

    launch/pipeline.sh RECIPE --hf DIR --data DIR --out DIR [--dry-run] [key=value ...]

Stages: import, train, export, evaluate, tables, in OUT/imported, run, exported, evaluation and
report. A stage whose complete output is there is skipped and a killed one goes on, so the same
command finishes what a kill at any point has left. key=value are keys of RECIPE, for instance
data.path=FILE; those that decide only where and how fast training runs may change between starts.
Exit code 75: asked to stop (SIGTERM, SIGUSR1), training has saved; the same command goes on.

OPDLM_LAUNCHER: the command that starts a module on all ranks (default: launch/one_node.sh), to
which MODULE ARGUMENT ... is added; for many nodes see docs/launching.md.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

from evaluation.recipe import describe as describe_evaluation
from evaluation.reporting.results import SUMMARY
from launch.pipeline_checks import check_same_command, find_lacks, note_command
from launch.pipeline_settings import Settings, add_flags, read_settings
from launch.stages import Requests, Stage, Stages, checkpoints, python
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import STOPPED, Arguments, InputError, RunError, Stopped, command
from megatron_opdlm.model_files.writing import write_json
from megatron_opdlm.run.file_lock import wait_for_lock

LOCK_SECONDS = 660  # for the processes of a killed pipeline to be gone: ranks may save for 600


def stages(settings: Settings) -> list[Stage]:
    """Every stage with what tells that its output is whole: names that are only given to that."""
    tables, partial = settings.out / "report", settings.out / ".report"
    mask = _flag("--mask-token-id", settings.mask_token_id)
    limit = _flag("--limit", settings.limit)

    def import_hf() -> list[str]:
        paths = ("--hf", str(settings.hf), "--out", str(settings.imported))
        return python("checkpoint_tools.import_hf", *paths, *mask)

    def train() -> list[str]:
        arguments = settings.training(settings.imported)
        return [*settings.launcher, "megatron_opdlm.train", *arguments]

    def export() -> list[str]:
        trained = settings.trained
        name = json.loads(trained.read_text())["checkpoint"] if trained.exists() else "LAST"
        checkpoint = settings.run / "checkpoints" / name
        paths = ("--checkpoint", str(checkpoint), "--out", str(settings.exported))
        return python("checkpoint_tools.export_hf", *paths, "--format", settings.format)

    def evaluate() -> list[str]:
        paths = ["--model", settings.exported, "--data", settings.data, "--out", settings.results]
        layout = ["--tp", settings.tp, "--ep", settings.ep]
        arguments = map(str, (settings.evaluation, *paths, *layout, *limit))
        return [*settings.launcher, "evaluation.recipe", *arguments]

    def report() -> list[str]:
        named = f"{settings.recipe.stem.replace('=', '-')}={settings.results}"
        return python("evaluation.report", named, "--out", str(partial))

    return [
        Stage(name="import", complete=settings.imported.exists, command=import_hf),
        Stage(
            name="train",
            complete=settings.trained.exists,
            command=train,
            finish=lambda: write_json(settings.trained, {"checkpoint": _newest(settings.run)}),
        ),
        Stage(name="export", complete=settings.exported.exists, command=export),
        Stage(name="evaluate", complete=(settings.results / SUMMARY).exists, command=evaluate),
        Stage(
            name="tables",
            complete=tables.exists,
            command=report,
            prepare=lambda: shutil.rmtree(partial, ignore_errors=True),
            finish=lambda: partial.replace(tables),
        ),
    ]


def _flag(name: str, value: int | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _newest(run: Path) -> str:
    """Name of the last complete checkpoint of a run."""
    saved = checkpoints(run)
    if not saved:
        raise RunError(f"{run} holds no checkpoint although training ended; see its messages")
    return saved[-1].name


def run_pipeline(settings: Settings) -> None:
    """Run every stage that is not complete, alone in OUT."""
    lacks = find_lacks(settings)
    if lacks.inputs:
        raise InputError("; ".join(lacks.inputs))
    print("".join(f"note: {text}\n" for text in lacks.graders), end="", flush=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / ".lock").open("w") as lock:
        _only_one(lock.fileno(), settings.out)
        check_same_command(settings)
        note_command(settings)
        requests, runner = Requests.listen(), Stages(held=(lock.fileno(),))
        for stage in stages(settings):
            if stage.complete():
                print(f"=== {stage.name}: complete, skipped", flush=True)
                continue
            requests.stop_before(stage.name)
            with runner.stage(stage.name, stage.name):
                stage.prepare()
                _run(stage, runner, requests, settings.run)
                stage.finish()
    print(f"report: {settings.out / 'report' / 'report.md'}")


def _only_one(lock: int, out: Path) -> None:
    """Wait until no process of another pipeline in this directory is left."""
    notice = f"--out {out}: another pipeline works there"
    if not wait_for_lock(lock, LOCK_SECONDS, notice):
        raise InputError(f"{notice}; wait for it, or use another")


def _run(stage: Stage, runner: Stages, requests: Requests, run: Path) -> None:
    """Run a stage's command to its end; ``run``: the training's directory."""
    before = _last_step(run)
    with requests.handed_on_to(runner.start(stage.name, stage.command())) as process:
        code = process.wait()
    if code == 0:
        return
    if code == STOPPED:
        raise Stopped(f"stage {stage.name} was asked to stop; the same command goes on")
    if requests.asked and (how := _stopped(stage.name, code, run, before)):
        raise Stopped(f"stage {stage.name} was asked to stop{how}; the same command goes on")
    asked = ", although it was asked to stop" if requests.asked else ""
    raise RunError(
        f"stage {stage.name} ended with code {code}{asked}; see its messages above, the same "
        "command goes on from there"
    )


def _stopped(name: str, code: int, run: Path, before: int) -> str:
    """What shows that a stage which was asked to stop ended for that, "" where nothing does: the
    signal, or, where a launcher hides the ranks' codes behind its 1, what the run has left.
    """
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return " and ended at once"
    if code != 1 or name not in ("train", "evaluate"):
        return ""
    hidden = "the launcher's code 1 hides whether a rank has failed: see the messages above"
    step = _last_step(run)
    if name == "evaluate" or step == before:
        return f" and had nothing to save ({hidden})"
    if [path.name for path in checkpoints(run)[-1:]] != [f"step_{step:07d}"]:
        return ""
    return f" and has saved step {step} ({hidden})"


def _last_step(run: Path) -> int:
    """The last step that a run has finished, 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a line that a kill has cut off
            return json.loads(line)["step"]
    return 0


def show(settings: Settings) -> str:
    """What would be done: the layout, the evaluation's runs and the commands; writes nothing."""
    from megatron_opdlm.run.dry_run import describe, usual_ranks

    check_same_command(settings)
    imported = settings.imported.is_dir()
    keys = settings.training(settings.imported if imported else settings.hf)[2:]
    if settings.mask_token_id is not None and not imported:
        keys.append(f"model.mask_token_id={settings.mask_token_id}")
    config = load_config(settings.recipe, keys)
    lacks = find_lacks(settings)
    lines = [f"note         {text}" for text in (*lacks.inputs, *lacks.graders)]
    world = settings.world
    if world is None:
        world = usual_ranks(config)
        lines.append(f"note         {world} ranks are assumed: no GPU is here and no --ranks given")
    lines += [describe(config, world), "", "evaluation"]
    lines += [describe_evaluation(settings.runs), ""]
    for stage in stages(settings):
        done = " (complete, skipped)" if stage.complete() else ""
        lines += [f"{stage.name}{done}", f"  {shlex.join(stage.command())}"]
    return "\n".join(lines)


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    add_flags(parser)
    return parser


def main() -> None:
    """Check the command line; show or run the stages."""
    args = _parser().parse_intermixed_args()
    settings = read_settings(args, os.environ)
    if args.dry_run:
        print(show(settings))
    else:
        run_pipeline(settings)


if __name__ == "__main__":
    command(main)
