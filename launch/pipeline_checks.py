"""Whether a directory may be gone on with by this command, and whether the inputs of the stages to
come are there: asked before the first stage.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.run import load_tasks
from evaluation.tasks import get_task
from launch.pipeline_settings import ROOT, Settings
from megatron_opdlm.config import differing_keys, load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import CONFIG
from megatron_opdlm.model_files.writing import write_json

RECORD = "pipeline.json"


def check_same_command(settings: Settings) -> None:
    """InputError where a stage that has begun was of another command. What a later stage needs may
    change until then; training may change what its own rule lets it (where and how fast).
    """
    found, wanted = _noted(settings), json.loads(json.dumps(settings.identity))
    stages = (
        (settings.imported, ("hf", "mask_token_id"), ""),
        (settings.exported, ("format",), "exported, evaluation and report"),
        (settings.results, ("data", "evaluation", "limit"), "evaluation and report"),
    )
    for output, keys, again in stages:
        differing = [key for key in keys if key in found and found[key] != wanted[key]]
        if differing and output.exists():
            remove = f", remove {again} in it to make them anew" if again else ""
            raise InputError(
                f"--out {settings.out} was made by another command, which differs in "
                f"{', '.join(differing)}; repeat that one{remove}, or use another directory"
            )
    _check_same_training(settings)


def note_command(settings: Settings) -> None:
    """Write down what this directory is of."""
    if _noted(settings) != json.loads(json.dumps(settings.identity)):
        write_json(settings.out / RECORD, settings.identity)


def _noted(settings: Settings) -> dict[str, Any]:
    path = settings.out / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_same_training(settings: Settings) -> None:
    recorded = settings.run / CONFIG
    if not recorded.is_file() or not differing_keys(load_config(recorded, []), settings.config):
        return
    # Imported late, since Megatron comes with it.
    from megatron_opdlm.run.run_directory import check_run_directory

    check_run_directory(settings.config)


@dataclass(kw_only=True)
class Lacks:
    """What the stages that are not complete will not find, each as value, rule and remedy."""

    inputs: list[str] = field(default_factory=list)  # without which a stage would fail
    graders: list[str] = field(default_factory=list)  # of tasks that will be left out


def find_lacks(settings: Settings) -> Lacks:
    """Read the data of both evaluations. InputError for a task that does not exist."""
    lacks = Lacks()
    if not settings.trained.exists():
        _of_training(settings, lacks)
    if not (settings.results / "summary.json").exists():
        names = dict.fromkeys(name for run in settings.runs for name in run.tasks)
        missing, graders = _of_tasks(list(names), settings.data, settings.limit)
        lacks.inputs += missing
        lacks.graders += [f"{text}; it will be left out" for text in graders]
    lacks.inputs = list(dict.fromkeys(lacks.inputs))
    return lacks


def _of_training(settings: Settings, lacks: Lacks) -> None:
    config, section = settings.config, settings.config.evaluation
    if not config.data.path:
        lacks.inputs.append("data.path is not set and training needs it; add data.path=PATH")
    paths = {
        "data.path": config.data.path,
        "mixing.path": config.mixing.path,
        "teacher.path": config.teacher.path,
    }
    lacks.inputs += [
        f"{key}={path}: no such file or directory; make it, or add {key}=PATH to the command"
        for key, path in paths.items()
        if path and not (ROOT / path).exists()
    ]
    if section.every:
        missing, graders = _of_tasks(section.tasks, ROOT / section.data, section.limit)
        lacks.inputs += [
            f"evaluation.tasks: {text}; or train without it: evaluation.every=0"
            for text in (*missing, *graders)
        ]


def _of_tasks(names: Sequence[str], data: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """What is wrong with the tasks' data files, and what this machine lacks to grade them."""
    missing, graders = [], []
    for name in names:
        task = get_task(name)
        try:
            ((_, rows),) = load_tasks([name], data, limit)
        except InputError as error:
            missing.append(str(error))
            continue
        if reason := task.missing(rows):
            graders.append(f"{task.name} cannot be graded here: {reason}")
    return missing, graders
