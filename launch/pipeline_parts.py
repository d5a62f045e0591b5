"""What a pipeline makes of its recipe: one training, or the answers and trainings of ``stages``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from evaluation.recipe import RecipeRun, read_recipe
from launch.stages import ROOT
from megatron_opdlm.config import Config, flatten, load_config, path_override, stages_of
from megatron_opdlm.errors import InputError

EVALUATIONS = ROOT / "configs" / "evaluation"
# What a model's reader must know of it, so that stages cannot differ in it.
SAME = ("loss.logit_shift", "states.block_alignment", "model.mask_token_id")
ALONE = "train"  # the training of a recipe without stages


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe with the keys of the command line."""

    file: Path
    overrides: tuple[str, ...]  # key=value, and stages.NAME.key=value of one stage

    def config(self, stage: str | None, *more: str) -> Config:
        return load_config(self.file, [*self.overrides, *more], stage)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A stage in which the autoregressive model answers the training prompts."""

    name: str
    recipe: Recipe
    directory: Path

    @property
    def answers(self) -> Path:
        """The data file; its manifest says how it was made."""
        return self.directory / "answers.jsonl"

    @property
    def config(self) -> Config:
        return self.recipe.config(self.name)

    def titled(self, what: str) -> str:
        return f"{what} of {self.name}"

    @property
    def flags(self) -> list[str]:
        """How evaluation.answer draws: as the recipe's rollouts are drawn."""
        config = self.config
        rollout = config.rollout
        drawn = {
            "temperature": rollout.temperature,
            "top-p": rollout.top_p,
            "top-k": rollout.top_k,
            "max-new-tokens": rollout.max_new_tokens,
            "seed": config.train.seed,
        }
        thinking = ["--enable-thinking"] if config.data.enable_thinking else []
        return [*(f"--{name}={value}" for name, value in drawn.items()), *thinking]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training, with what is made of its last checkpoint."""

    name: str
    recipe: Recipe
    directory: Path
    imported: Path
    stage: str | None  # of the recipe; None where it has none
    evaluation: Path  # recipe
    begins: "Training | None"  # whose weights it goes on with; None: those of the imported model
    answers: Path | None  # what it reads in place of data.path

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def trained(self) -> Path:
        """Names the checkpoint that training ended with."""
        return self.directory / "trained.json"

    @property
    def exported(self) -> Path:
        return self.directory / "exported"

    @property
    def results(self) -> Path:
        """Directory of the evaluation."""
        return self.directory / "evaluation"

    @property
    def config(self) -> Config:
        return self.recipe.config(self.stage, *self.places())

    def titled(self, what: str) -> str:
        """The name of something that each training has."""
        return what if self.stage is None else f"{what} of {self.name}"

    @cached_property
    def runs(self) -> list[RecipeRun]:
        """Of the evaluation."""
        return read_recipe(self.evaluation)

    @property
    def arguments(self) -> list[str]:
        """Of the training command."""
        chosen = [] if self.stage is None else ["--stage", self.stage]
        return ["--config", str(self.recipe.file), *chosen, *self.recipe.overrides, *self.places()]

    def places(self) -> list[str]:
        """Keys that the pipeline decides. The teacher is the imported model wherever the student
        begins: an empty ``teacher.path`` would be the student's start.
        """
        start = self.imported if self.begins is None else self.begins.checkpoint
        keys = [path_override("train.out", self.run), path_override("model.path", start)]
        plain = self.recipe.config(self.stage)
        if self.begins is not None and not plain.teacher.path and plain.loss.kind != "nll":
            keys.append(path_override("teacher.path", self.imported))
        if self.answers is not None:
            keys.append(path_override("data.path", self.answers))
        return keys

    def foreseen(self, model: Path) -> list[str]:
        """Keys with ``model`` for a start, and prompts for answers, that are not there yet."""
        keys = self.places()
        if not (self.imported if self.begins is None else self.begins.trained).exists():
            keys.append(path_override("model.path", model))
        if not self.imported.exists() and any(key.startswith("teacher.path=") for key in keys):
            keys.append(path_override("teacher.path", model))
        if self.answers is not None and not self.answers.exists():
            prompts = Path(self.recipe.config(self.stage).data.path)
            keys += [path_override("data.path", prompts), "mixing.fraction=0"]
        return keys

    @property
    def checkpoint(self) -> Path:
        """That it ended with."""
        name = "LAST"
        if self.trained.exists():
            name = json.loads(self.trained.read_text())["checkpoint"]
        return self.run / "checkpoints" / name


Part = Answering | Training


def parts_of(recipe: Recipe, out: Path, evaluation: Path | None) -> list[Part]:
    """What a recipe asks for, in order. ``evaluation``: of trainings that name none of their own;
    None: that of the recipe's name. InputError where the stages do not go together.
    """
    alone = Training(
        name=ALONE,
        recipe=recipe,
        directory=out,
        imported=out / "imported",
        stage=None,
        evaluation=evaluation or EVALUATIONS / recipe.file.name,
        begins=None,
        answers=None,
    )
    entries = stages_of(recipe.file)
    if not entries:
        return [alone]
    parts: list[Part] = []
    before, answers = None, None
    for entry in entries:
        directory = out / "stages" / entry.name
        if not entry.trains:
            parts.append(Answering(name=entry.name, recipe=recipe, directory=directory))
            answers = parts[-1].answers
            continue
        own = recipe.file.parent / entry.evaluate if entry.evaluate else alone.evaluation
        before = replace(
            alone,
            name=entry.name,
            directory=directory,
            stage=entry.name,
            evaluation=own,
            begins=before,
            answers=answers if entry.kind == "warm_up" and not entry.has_own_data else None,
        )
        parts.append(before)
    _check_same_model(parts)
    return parts


def trainings(parts: Sequence[Part]) -> list[Training]:
    return [part for part in parts if isinstance(part, Training)]


def _check_same_model(parts: Sequence[Part]) -> None:
    """InputError where one training does not make the model that the next goes on with, or an
    evaluation asks in other blocks than a student was trained in.
    """
    first, *others = trainings(parts)
    values = flatten(first.recipe.config(first.stage))
    for other in others:
        own = flatten(other.recipe.config(other.stage))
        for key in SAME:
            if own[key] != values[key]:
                raise InputError(
                    f"stages {first.name} and {other.name} have {key}={values[key]} and "
                    f"{own[key]}, but make one model; use the same value in all stages"
                )
    for training in (first, *others):
        block = training.recipe.config(training.stage).rollout.block_size
        asked = {run.decoding.block_size for run in training.runs if run.decoding.mode != "ar"}
        if asked and block not in asked:
            raise InputError(
                f"stage {training.name} trains blocks of rollout.block_size={block}, and its "
                f"evaluation {training.evaluation} asks in blocks of {min(asked)}; name one with "
                "'evaluate: FILE'"
            )
