"""Whether a directory may be gone on with by this command, and whether the inputs of the stages to
come are there: asked before the first stage.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.reporting.results import SUMMARY
from evaluation.run import load_tasks, load_training_tasks
from evaluation.tasks import get_task
from launch.pipeline_parts import Answering, Training
from launch.pipeline_settings import Settings
from launch.stages import ROOT
from megatron_opdlm.config import Config, differing_keys, load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import CONFIG
from megatron_opdlm.model_files.writing import write_json

RECORD = "pipeline.json"


def check_same_command(settings: Settings) -> None:
    """InputError where a stage that has begun was of another command. What a later stage needs may
    change until then; training may change what its own rule lets it (where and how fast).
    """
    found, wanted = _noted(settings), json.loads(json.dumps(settings.identity))
    outputs: list[tuple[Path, tuple[str, ...], str]] = [
        (settings.imported, ("hf", "mask_token_id"), "")
    ]
    for part in settings.parts:
        if isinstance(part, Answering):
            outputs.append((part.answers, (part.titled("answers"),), part.answers.name))
            continue
        again = "exported, evaluation and report", "evaluation and report"
        outputs.append((part.exported, ("format",), again[0]))
        outputs.append((part.results, ("data", "limit", part.titled("evaluation")), again[1]))
    for output, keys, again in outputs:
        differing = [key for key in keys if key in found and found[key] != wanted[key]]
        if differing and output.exists():
            remove = f", remove {again} in it to make them anew" if again else ""
            raise InputError(
                f"--out {settings.out} was made by another command, which differs in "
                f"{', '.join(differing)}; repeat that one{remove}, or use another directory"
            )
    for training in settings.trainings:
        _check_same_training(training)


def note_command(settings: Settings) -> None:
    """Write down what this directory is of."""
    if _noted(settings) != json.loads(json.dumps(settings.identity)):
        write_json(settings.out / RECORD, settings.identity)


def _noted(settings: Settings) -> dict[str, Any]:
    path = settings.out / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_same_training(training: Training) -> None:
    recorded, config = training.run / CONFIG, training.config
    if not recorded.is_file() or not differing_keys(load_config(recorded, []), config):
        return
    # Imported late, since Megatron comes with it.
    from megatron_opdlm.run.run_directory import check_run_directory

    check_run_directory(config)


@dataclass(kw_only=True)
class Lacks:
    """What the stages that are not complete will not find, each as value, rule and remedy."""

    inputs: list[str] = field(default_factory=list)  # without which a stage would fail
    graders: list[str] = field(default_factory=list)  # of tasks that will be left out


def find_lacks(settings: Settings) -> Lacks:
    """Ask training and evaluation about their data before the first stage, and what this machine
    lacks to grade it. InputError for a task that does not exist.
    """
    lacks = Lacks()
    for part in settings.parts:
        if isinstance(part, Answering):
            if not part.answers.exists():
                lacks.inputs += _missing_files(settings, part.config)
        else:
            _find_training_lacks(lacks, settings, part)
    lacks.inputs, lacks.graders = list(dict.fromkeys(lacks.inputs)), [*dict.fromkeys(lacks.graders)]
    return lacks


def _find_training_lacks(lacks: Lacks, settings: Settings, training: Training) -> None:
    """Of a training and its evaluation."""
    config = training.config
    asked = dict.fromkeys(name for run in training.runs for name in run.tasks)
    for name in (*config.evaluation.tasks, *asked):
        get_task(name)
    if not training.trained.exists():
        lacks.inputs += _missing_files(settings, config)
        with _noted_in(lacks.inputs):
            load_training_tasks(config.evaluation)
    if not (training.results / SUMMARY).exists():
        for name in asked:
            with _noted_in(lacks.inputs):
                ((task, rows),) = load_tasks([name], settings.data, settings.limit)
                if reason := task.missing(rows):
                    lacks.graders.append(
                        f"{task.name} cannot be graded here: {reason}; it will be left out"
                    )


@contextmanager
def _noted_in(inputs: list[str]) -> Iterator[None]:
    """Bad input is collected, so that all of it is named at once."""
    try:
        yield
    except InputError as error:
        inputs.append(str(error))


def _missing_files(settings: Settings, config: Config) -> list[str]:
    """Of a configuration, but for what the pipeline makes itself."""
    paths = {
        "data.path": config.data.path,
        "mixing.path": config.mixing.path,
        "teacher.path": config.teacher.path,
    }
    unset = (
        []
        if config.data.path
        else ["data.path is not set and training needs it; add data.path=PATH"]
    )
    return unset + [
        f"{key}={path}: no such file or directory; make it, or add {key}=PATH to the command"
        for key, path in paths.items()
        if path and not Path(path).is_relative_to(settings.out) and not (ROOT / path).exists()
    ]
