"""Layouts of a run on so many GPUs: which fit, how they are filled, and why the others do not."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from launch.planner.estimate import Question, seconds_of_step
from megatron_opdlm.config import Config
from megatron_opdlm.configuration.models import Recompute
from megatron_opdlm.diffusion.blocks import sequence_end
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.planning.accelerators import MARGIN, USABLE
from megatron_opdlm.planning.phase_memory import CACHE, PHASES, RankMemory
from megatron_opdlm.planning.rank_memory import Split, kv_bytes_per_token
from megatron_opdlm.planning.step_time import total
from megatron_opdlm.run import build
from megatron_opdlm.run.expected_memory import most_of_a_step, split_of

GIB = 2**30
ROWS = (32768, 16384, 8192, 4096)  # tokens of a microbatch that are tried
# What makes room without changing the result, at the price of copies.
OFFLOADS: tuple[dict[str, object], ...] = (
    {},
    {"teacher.offload_weights": True},
    {"teacher.offload_weights": True, "optimizer.cpu_offload": True},
)
# One GPU's layout.
WHOLE: dict[str, object] = {
    "model.tensor_parallel": 1,
    "model.pipeline_parallel": 1,
    "model.context_parallel": 1,
    "model.expert_parallel": 1,
    "model.sequence_parallel": False,
}


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


def with_rows(config: Config, hardware: Hardware) -> Config:
    """With the length of packed rows in place of 0, which stands for what suits the hardware."""
    rows = config.update.tokens_per_microbatch or hardware.row_tokens
    return with_keys(config, {"update.tokens_per_microbatch": rows})


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


def as_it_is(question: Question) -> Planned | Refused:
    """The recipe's own layout, whether it fits or not; refused where it divides nothing."""
    config = question.config
    own = {key: _value(config, key) for key in WHOLE}
    reason = _indivisible(question, config)
    return Refused(name=_asked(own), reason=reason) if reason else _planned(question, config, {})


def _indivisible(question: Question, config: Config) -> str | None:
    """Why a layout divides the GPUs or the models not; None: it does."""
    pair = (question.student, "model.path"), (question.teacher, "teacher.path")
    try:
        for source, key in pair:
            build.require_layout(config, source, key, question.gpus)
    except InputError as error:
        return str(error).partition(";")[0]
    return None


def why_not(question: Question, planned: Planned) -> str | None:
    """What does not fit on the GPU; None: all does."""
    room, memory = usable(question), planned.memory
    need, phase = _need(planned)
    if need > room:
        largest = sorted(memory.sizes(phase).items(), key=lambda one: -one[1])[:2]
        shown = ", ".join(f"{part} {size / GIB:.0f}" for part, size in largest)
        return (
            f"needs {need / GIB:.1f} GiB in the {phase} (of it {shown}), {room / GIB:.1f} are there"
        )
    cache, longest = memory.sizes("rollout").get(CACHE, 0.0), longest_cache(question, planned)
    if cache < longest:
        return (
            f"the cache of the longest sequence takes {longest / GIB:.1f} GiB, "
            f"{cache / GIB:.1f} are free for it in the rollout"
        )
    return None


def _need(planned: Planned) -> tuple[float, str]:
    """Bytes of the phase that takes most, and which one that is."""
    return max((planned.memory.peak(phase, MARGIN), phase) for phase in PHASES)


def longest_cache(question: Question, planned: Planned) -> float:
    """Bytes of the cache that one sequence can come to take."""
    config, shape = planned.config, question.student.shape
    load = most_of_a_step(config, shape)
    positions = sequence_end(load.prompt, load.response, config.rollout.block_size)
    item = build.resolve_dtype(config.model.dtype, question.hardware, shape).itemsize
    return positions * kv_bytes_per_token(shape, planned.split, item)


def usable(question: Question) -> float:
    """Bytes of a GPU that a plan may fill."""
    return USABLE * question.machine.gpu.memory


def search(question: Question) -> tuple[list[Planned], list[Refused]]:
    """Every layout of powers of two: those that fit, the fastest first, and the others."""
    fitting, refused = [], []
    for keys in _layouts(question):
        reason = _indivisible(question, with_keys(question.config, keys))
        if reason is not None:
            refused.append(Refused(name=_asked(keys), reason=reason))
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
    """The fastest way to fill a layout: what waits in host memory, recomputed or not, how long the
    rows. All of a replica's sequences have a slot: the cache is in pages, so that a slot takes what
    it uses. Where none fits, why that does not which takes least.
    """
    best: Planned | None = None
    least: Planned | None = None
    for offloads in _offloads(question):
        for recompute in get_args(Recompute):
            for rows in ROWS:
                keys = layout | offloads
                keys |= {"model.recompute": recompute, "update.tokens_per_microbatch": rows}
                found = _with_slots(question, keys)
                if why_not(question, found) is not None:
                    least = found if least is None else min(least, found, key=_need)
                elif best is None or total(found.seconds) < total(best.seconds):
                    best = found
    if best is not None:
        return best
    assert least is not None
    return Refused(name=name_of(least.split), reason=str(why_not(question, least)))


def _offloads(question: Question) -> Sequence[dict[str, object]]:
    """Float32 master weights are the model's own where it is float32, and stay."""
    dtype, shape = question.config.model.dtype, question.student.shape
    item = build.resolve_dtype(dtype, question.hardware, shape).itemsize
    return OFFLOADS if item == 2 else OFFLOADS[:2]


def _with_slots(question: Question, keys: dict[str, object]) -> Planned:
    """A layout with a slot for every sequence."""
    split = split_of(with_keys(question.config, keys), question.gpus)
    load = most_of_a_step(question.config, question.student.shape)
    slots = -(-load.sequences // (split.data * split.context))
    return _planned(question, question.config, {**keys, "rollout.slots": slots})


def _planned(question: Question, config: Config, keys: dict[str, object]) -> Planned:
    config = with_keys(config, keys)
    split = split_of(config, question.gpus)
    memory = question.memory(config, split, usable(question))
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
