"""Layouts of a run on so many GPUs: which fit, how they are filled, and why the others do not."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from launch.planner.estimate import Question, seconds_of_step
from megatron_opdlm.config import Config
from megatron_opdlm.errors import InputError
from megatron_opdlm.planning.accelerators import USABLE
from megatron_opdlm.planning.phase_memory import RankMemory
from megatron_opdlm.planning.rank_memory import Split
from megatron_opdlm.planning.step_time import total
from megatron_opdlm.run import build
from megatron_opdlm.run.expected_memory import (
    expected_memory,
    kv_cache_bytes,
    most_of_a_step,
    split_of,
)

GIB = 2**30
ROWS = (32768, 16384, 8192, 4096)  # tokens of a microbatch that are tried
CACHE_SHARE = 0.5  # of what is free in the rollout: the engine takes no more by itself
# What makes room without changing the result, tried where nothing fits without it.
OFFLOADS = (
    {},
    {"teacher.offload_weights": True},
    {"teacher.offload_weights": True, "optimizer.cpu_offload": True},
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A layout that fits."""

    config: Config
    split: Split
    memory: RankMemory
    seconds: dict[str, float]  # of a step of full length, by phase
    keys: dict[str, object]  # what it sets otherwise than the recipe


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layout that does not, and why."""

    name: str
    reason: str


def name_of(split: Split, *, sequence_parallel: bool = False) -> str:
    expert = f" EP {split.expert}" if split.expert > 1 else ""
    name = f"TP {split.tensor} PP {split.pipeline} CP {split.context} DP {split.data}{expert}"
    return name + (" SP" if sequence_parallel else "")


def with_keys(config: Config, keys: dict[str, object]) -> Config:
    """The configuration with other values, given by dotted key."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **values)
            for section, values in sections.items()
        },
    )


def as_it_is(question: Question) -> Planned:
    """The recipe's own layout, whether it fits or not. InputError where it divides nothing."""
    config = question.config
    for source, key in ((question.student, "model.path"), (question.teacher, "teacher.path")):
        build.require_layout(config, source, key, question.gpus)
    return _planned(question, config, {})


def why_not(question: Question, memory: RankMemory) -> str | None:
    """What does not fit on the GPU; None: all does."""
    room, phase = usable(question), memory.fullest
    if memory.peak(phase) <= room:
        return None
    largest = sorted(memory.sizes(phase).items(), key=lambda one: -one[1])[:2]
    shown = ", ".join(f"{part} {size / GIB:.0f}" for part, size in largest)
    return (
        f"needs {memory.peak(phase) / GIB:.0f} GiB in the {phase} ({shown}), "
        f"{room / GIB:.0f} are there"
    )


def usable(question: Question) -> float:
    """Bytes of a GPU that a plan may fill."""
    return USABLE * question.machine.gpu.memory


def search(question: Question) -> tuple[list[Planned], list[Refused]]:
    """Every layout of powers of two: those that fit, the fastest first, and the others."""
    fitting, refused = [], []
    for keys in _layouts(question):
        config = with_keys(question.config, keys)
        try:
            for source, key in (
                (question.student, "model.path"),
                (question.teacher, "teacher.path"),
            ):
                build.require_layout(config, source, key, question.gpus)
        except InputError as error:
            refused.append(Refused(name=_asked(keys), reason=str(error).partition(";")[0]))
            continue
        found = _filled(question, keys)
        (fitting if isinstance(found, Planned) else refused).append(found)
    fitting.sort(key=lambda planned: total(planned.seconds))
    return fitting, refused


def _asked(keys: dict[str, object]) -> str:
    tensor, pipeline, context, expert = (
        keys[f"model.{name}_parallel"] for name in ("tensor", "pipeline", "context", "expert")
    )
    return f"TP {tensor} PP {pipeline} CP {context}" + (f" EP {expert}" if expert != 1 else "")


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _layouts(question: Question) -> Iterator[dict[str, object]]:
    """Tensor ranks stay on one machine; experts, where there are any, are shared out as well."""
    gpus, per_node = question.gpus, question.machine.per_node
    experts = question.student.shape.experts
    for tensor in _powers(min(gpus, per_node)):
        for pipeline in _powers(gpus // tensor):
            for context in _powers(gpus // tensor // pipeline):
                if gpus % (tensor * pipeline * context):
                    continue
                copies = gpus // (tensor * pipeline)
                for expert in _powers(copies) if experts else [1]:
                    yield {
                        "model.tensor_parallel": tensor,
                        "model.pipeline_parallel": pipeline,
                        "model.context_parallel": context,
                        "model.expert_parallel": expert,
                        "model.sequence_parallel": tensor > 1,
                    }


def _filled(question: Question, layout: dict[str, object]) -> Planned | Refused:
    """The fastest way to fill a layout: recomputed or not, how long the rows, how many slots."""
    refusal = None
    for offloads in OFFLOADS:
        best = None
        for recompute in (False, True):
            for rows in ROWS:
                keys = layout | offloads
                keys |= {"model.recompute": recompute, "update.tokens_per_microbatch": rows}
                found = _with_slots(question, keys)
                if isinstance(found, Refused):
                    refusal = found
                elif best is None or total(found.seconds) < total(best.seconds):
                    best = found
        if best is not None:
            return best
    assert refusal is not None
    return refusal


def _with_slots(question: Question, keys: dict[str, object]) -> Planned | Refused:
    """The most slots whose cache has room in the rollout."""
    config = with_keys(question.config, keys)
    split = split_of(config, question.gpus)
    name = name_of(split)
    load = most_of_a_step(config, question.student.shape)
    each = -(-load.sequences // (split.data * split.context))
    room, slots = usable(question), each
    while True:
        planned = _planned(question, config, {**keys, "rollout.slots": slots})
        reason = why_not(question, planned.memory)
        cache, kept = kv_cache_bytes(
            planned.config, question.student.shape, split, question.hardware, load
        )
        free = room - planned.memory.held("rollout")
        if reason is None and (kept or cache <= CACHE_SHARE * free):
            return planned
        if slots == 1 or (planned.memory.fullest != "rollout" and reason is not None):
            reason = reason or (
                f"the cache of one sequence takes {cache / GIB:.1f} GiB, "
                f"{CACHE_SHARE * free / GIB:.1f} are free for it in the rollout"
            )
            return Refused(name=name, reason=reason)
        slots = max(1, slots // 2)


def _planned(question: Question, config: Config, keys: dict[str, object]) -> Planned:
    config = with_keys(config, keys)
    split = split_of(config, question.gpus)
    load = most_of_a_step(config, question.student.shape)
    memory = expected_memory(
        config, question.student, question.teacher, split, question.hardware, load
    )
    lengths = question.lengths(question.steps)
    return Planned(
        config=config,
        split=split,
        memory=memory,
        seconds=seconds_of_step(question, config, split, memory, lengths),
        keys={k: v for k, v in keys.items() if v != _value(question.config, k)},
    )


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
