"""The configuration of a run: a typed, frozen tree. Defaults < YAML file < dotted overrides.

A key that does not exist, a value of the wrong type, a value outside its range and a value that is
not built yet are all an ``InputError`` of one line. Imports no torch: a bad configuration fails
before anything slow is loaded. What each key is stands at the key, in ``configuration/``.
"""

import dataclasses
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_opdlm.configuration import document, rules, stages
from megatron_opdlm.configuration.learning import (
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
    UpdateConfig,
)
from megatron_opdlm.configuration.models import (
    AttentionConfig,
    LoraConfig,
    ModelConfig,
    TeacherConfig,
)
from megatron_opdlm.configuration.sequences import (
    CurriculumConfig,
    DataConfig,
    MixingConfig,
    RolloutConfig,
    StatesConfig,
    ThresholdScheduleConfig,
)
from megatron_opdlm.configuration.stages import STAGES, StageEntry, read_stages
from megatron_opdlm.configuration.tree import build, flatten
from megatron_opdlm.configuration.values import merged, read_file, read_override, resolved
from megatron_opdlm.errors import InputError
from megatron_opdlm.keys import keys_of, section, types_of


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = section(ModelConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    lora: LoraConfig = section(LoraConfig)
    attention: AttentionConfig = section(AttentionConfig, may_change=True)
    data: DataConfig = section(DataConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    curriculum: CurriculumConfig = section(CurriculumConfig)
    threshold_schedule: ThresholdScheduleConfig = section(ThresholdScheduleConfig)
    states: StatesConfig = section(StatesConfig)
    mixing: MixingConfig = section(MixingConfig)
    loss: LossConfig = section(LossConfig)
    update: UpdateConfig = section(UpdateConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, may_change=True)
    evaluation: EvaluationConfig = section(EvaluationConfig, may_change=True)
    distributed: DistributedConfig = section(DistributedConfig, may_change=True)
    logging: LoggingConfig = section(LoggingConfig, may_change=True)
    profile: ProfileConfig = section(ProfileConfig, may_change=True)


def load_config(file: Path | None, overrides: list[str], stage: str | None = None) -> Config:
    """Defaults, then ``file`` (over its ``base``), then ``overrides`` (``section.key=VALUE``);
    checked.

    A value may refer to another key: ``${model.path}``. ``stage``: name of one of the file's
    ``stages``, whose keys come between; ``stages.NAME.section.key=VALUE`` overrides those of one. A
    stage draws with a seed of its own, ``train.seed`` plus its place: else all would begin with the
    same prompts.
    """
    tree, entries, where = _recipe(file)
    chosen = stages.named(entries, stage, where) if stage is not None else None
    common, own = _overrides(stage, overrides, entries, where)
    try:
        given = [read_override(Config, text) for text in own]
        if chosen is not None:
            tree = stages.laid_over(tree, chosen)
        trees = [dataclasses.asdict(Config()), tree, *(read_override(Config, o) for o in common)]
        config = build(Config, resolved(merged([*trees, *given])))
        if chosen is not None and not stages.has_seed([chosen.keys, *given]):
            seed = config.train.seed + entries.index(chosen)
            config = replace(config, train=replace(config.train, seed=seed))
        rules.check(flatten(config))
    except InputError as error:
        if stage is None:
            raise
        raise InputError(f"stage {stage}: {error}") from None
    return config


def stages_of(file: Path) -> list[StageEntry]:
    """The stages of a recipe; [] of one that is a single training."""
    return _recipe(file)[1]


def _recipe(file: Path | None) -> tuple[dict[Any, Any], list[StageEntry], str]:
    """The sections of a file, its stages, and what it is called in messages."""
    tree = read_file(file) if file is not None else {}
    where = f"configuration file {file}"
    entries = read_stages(tree.pop(STAGES, None), where, types_of(Config))
    return tree, entries, where


def _overrides(
    stage: str | None, overrides: list[str], entries: list[StageEntry], where: str
) -> tuple[list[str], list[str]]:
    """The overrides of all stages, and those of this one alone."""
    common, own = [], []
    for override in overrides:
        of_one = stages.of_stage(override)
        if of_one is None:
            common.append(override)
        elif stages.named(entries, of_one[0], where).name == stage:
            own.append(of_one[1])
    return common, own


def require(config: Config, *keys: str) -> None:
    """Refuse a configuration in which one of these text keys is still empty."""
    values = flatten(config)
    for key in keys:
        if not values[key]:
            raise InputError(
                f"{key} is not set and this command needs it; add {key}=... to the command or file"
            )


def to_yaml(config: Config) -> str:
    """The whole configuration; ``load_config`` reads it back to an equal one."""
    tree = _without_references(dataclasses.asdict(config))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def path_override(key: str, path: Path) -> str:
    """The override that gives a key this path, whatever its name holds."""
    return f"{key}={_without_references(str(path))}"


def _without_references(value: Any) -> Any:
    """Text that looks like a reference to another key, so written that it is none."""
    if isinstance(value, dict):
        return {key: _without_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_references(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def differing_keys(a: Config, b: Config) -> list[str]:
    """Dotted keys whose values differ, in the order of the tree."""
    values_a, values_b = flatten(a), flatten(b)
    return [key for key, value in values_a.items() if value != values_b[key]]


def may_change(key: str) -> bool:
    """Whether a dotted key may have another value when a run goes on: it decides where, how fast
    and how long, never what a step computes.
    """
    place, _, name = key.partition(".")
    whole = next(item for item in dataclasses.fields(Config) if item.name == place)
    return whole.metadata["may_change"] or keys_of(types_of(Config)[place])[name].may_change


if __name__ == "__main__":
    print(document.markdown(Config), end="")
