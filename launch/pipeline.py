"""From a Hugging Face model to the tables of its block-diffusion student, by one command.

    launch/pipeline.sh RECIPE --hf DIR --data DIR --out DIR [--dry-run] [key=value ...]

Stages: import, train, export, evaluate, tables, in OUT/imported, run, exported, evaluation and
report. A RECIPE with ``stages`` (docs/recipes.md) has its own between import and tables, in
OUT/stages/NAME: answers, or a training that is exported and evaluated. A stage whose complete
output is there is skipped and a killed one goes on, so the same command finishes what a kill at any
point has left. key=value are keys of RECIPE, for instance data.path=FILE; those that decide only
where and how fast training runs may change between starts.
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
from launch.pipeline_parts import Answering, Training
from launch.pipeline_settings import Settings, add_flags, read_settings
from launch.stage_report import compared
from launch.stages import Requests, Stage, Stages, checkpoints, python
from megatron_opdlm.data.checks import MANIFEST
from megatron_opdlm.errors import STOPPED, Arguments, InputError, RunError, Stopped, command
from megatron_opdlm.model_files.writing import write_json, write_text
from megatron_opdlm.run.file_lock import wait_for_lock

LOCK_SECONDS = 660  # for the processes of a killed pipeline to be gone: ranks may save for 600


def stages(settings: Settings) -> list[Stage]:
    """Every stage with what tells that its output is whole: names that are only given to that."""
    tables, partial = settings.out / "report", settings.out / ".report"
    mask = _flag("--mask-token-id", settings.mask_token_id)

    def import_hf() -> list[str]:
        paths = ("--hf", str(settings.hf), "--out", str(settings.imported))
        return python("checkpoint_tools.import_hf", *paths, *mask)

    def report() -> list[str]:
        stem = settings.recipe.file.stem.replace("=", "-")
        named = [f"{_titled(stem, t)}={t.results}" for t in settings.trainings]
        return python("evaluation.report", *named, "--out", str(partial))

    def finish() -> None:
        if settings.last.stage is not None:
            write_text(partial / "stages.md", compared(settings.parts))
        partial.replace(tables)

    return [
        Stage(name="import", complete=settings.imported.exists, command=import_hf),
        *(
            stage
            for part in settings.parts
            for stage in (
                _training(settings, part)
                if isinstance(part, Training)
                else [_answering(settings, part)]
            )
        ),
        Stage(
            name="tables",
            complete=tables.exists,
            command=report,
            prepare=lambda: shutil.rmtree(partial, ignore_errors=True),
            finish=finish,
        ),
    ]


def _answering(settings: Settings, part: Answering) -> Stage:
    def answer() -> list[str]:
        model, out = str(settings.imported), str(part.answers)
        paths = ["--model", model, "--prompts", part.config.data.path, "--out", out]
        arguments = [*paths, *part.flags, *_layout(settings)]
        return [*settings.launcher, "evaluation.answer", *arguments]

    # The manifest is written last.
    whole = part.answers.with_name(part.answers.name + MANIFEST).exists
    return Stage(name=part.name, complete=whole, command=answer, launched=True)


def _training(settings: Settings, part: Training) -> list[Stage]:
    def train() -> list[str]:
        return [*settings.launcher, "megatron_opdlm.train", *part.arguments]

    def export() -> list[str]:
        paths = ("--checkpoint", str(part.checkpoint), "--out", str(part.exported))
        return python("checkpoint_tools.export_hf", *paths, "--format", settings.format)

    def evaluate() -> list[str]:
        paths = ["--model", part.exported, "--data", settings.data, "--out", part.results]
        limit = _flag("--limit", settings.limit)
        arguments = map(str, (part.evaluation, *paths, *_layout(settings), *limit))
        return [*settings.launcher, "evaluation.recipe", *arguments]

    before = "" if part.stage is None else f"{part.name}: "
    return [
        Stage(
            name=part.name,
            complete=part.trained.exists,
            command=train,
            finish=lambda: write_json(part.trained, {"checkpoint": _newest(part.run)}),
            launched=True,
            run=part.run,
        ),
        Stage(name=f"{before}export", complete=part.exported.exists, command=export),
        Stage(
            name=f"{before}evaluate",
            complete=(part.results / SUMMARY).exists,
            command=evaluate,
            launched=True,
        ),
    ]


def _layout(settings: Settings) -> list[str]:
    """Of generation outside training."""
    return ["--tp", str(settings.tp), "--ep", str(settings.ep)]


def _titled(stem: str, training: Training) -> str:
    """Name of a student in the tables."""
    return stem if training.stage is None else f"{stem}/{training.name}"


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
                _run(stage, runner, requests)
                stage.finish()
    print(f"report: {settings.out / 'report' / 'report.md'}")


def _only_one(lock: int, out: Path) -> None:
    """Wait until no process of another pipeline in this directory is left."""
    notice = f"--out {out}: another pipeline works there"
    if not wait_for_lock(lock, LOCK_SECONDS, notice):
        raise InputError(f"{notice}; wait for it, or use another")


def _run(stage: Stage, runner: Stages, requests: Requests) -> None:
    """Run a stage's command to its end."""
    before = _last_step(stage.run)
    with requests.handed_on_to(runner.start(stage.name, stage.command())) as process:
        code = process.wait()
    if code == 0:
        return
    if code == STOPPED:
        raise Stopped(f"stage {stage.name} was asked to stop; the same command goes on")
    if requests.asked and (how := _stopped(stage, code, before)):
        raise Stopped(f"stage {stage.name} was asked to stop{how}; the same command goes on")
    asked = ", although it was asked to stop" if requests.asked else ""
    raise RunError(
        f"stage {stage.name} ended with code {code}{asked}; see its messages above, the same "
        "command goes on from there"
    )


def _stopped(stage: Stage, code: int, before: int) -> str:
    """What shows that a stage which was asked to stop ended for that, "" where nothing does: the
    signal, or, where a launcher hides the ranks' codes behind its 1, what the run has left.
    """
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return " and ended at once"
    if code != 1 or not stage.launched:
        return ""
    hidden = "the launcher's code 1 hides whether a rank has failed: see the messages above"
    step = _last_step(stage.run)
    if stage.run is None or step == before:
        return f" and had nothing to save ({hidden})"
    if [path.name for path in checkpoints(stage.run)[-1:]] != [f"step_{step:07d}"]:
        return ""
    return f" and has saved step {step} ({hidden})"


def _last_step(run: Path | None) -> int:
    """The last step that a run has finished, 0 before the first or where nothing is trained."""
    if run is None:
        return 0
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
    lacks = find_lacks(settings)
    lines = [f"note         {text}" for text in (*lacks.inputs, *lacks.graders)]
    mask: list[str] = []
    if settings.mask_token_id is not None and not settings.imported.is_dir():
        mask = [f"model.mask_token_id={settings.mask_token_id}"]
    for training in settings.trainings:
        config = training.recipe.config(training.stage, *training.foreseen(settings.hf), *mask)
        world = settings.world
        if world is None:
            world = usual_ranks(config)
            lines.append(
                f"note         {world} ranks are assumed: no GPU is here and no --ranks given"
            )
        if training.stage is not None:
            lines += ["", f"stage        {training.name}"]
        lines += [describe(config, world), "", f"evaluation   {training.evaluation}"]
        lines += [describe_evaluation(training.runs), ""]
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
