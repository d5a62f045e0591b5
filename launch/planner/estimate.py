"""Seconds, tokens and operations of a run on a layout."""

from dataclasses import dataclass, field
from functools import cached_property

from launch.planner.sequence_work import Counter, Lengths, SequenceWork
from megatron_opdlm.config import Config
from megatron_opdlm.curriculum import generation_budget, updates_per_step
from megatron_opdlm.engine.cache_budget import PAGE_TOKENS
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.planning import step_time
from megatron_opdlm.planning.phase_memory import CACHE
from megatron_opdlm.planning.rank_memory import Split, kv_bytes_per_token, rank_numbers
from megatron_opdlm.planning.step_time import PHASES, Decoding, Kept, Machine, ModelWork, Update
from megatron_opdlm.reporting.accounting import paper_flops
from megatron_opdlm.run.build import resolve_dtype
from megatron_opdlm.run.expected_memory import (
    OPTIMIZER,
    TEACHER_LAYERS,
    RankMemory,
    expected_memory,
    most_of_a_step,
)
from megatron_opdlm.storage.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is planned: a run on so many GPUs, and what is assumed of its sequences."""

    config: Config
    student: ModelSource
    teacher: ModelSource
    gpus: int
    machine: Machine
    hardware: Hardware
    prompt: int  # tokens, mean
    response: int  # tokens, mean once no limit of a step cuts it
    per_pass: float  # tokens that a denoising pass commits
    steps: int
    corrections: dict[str, float] = field(default_factory=dict)  # phase -> measured / computed

    @cached_property
    def counter(self) -> Counter:
        return Counter(self.config, self.student, self.teacher)

    def memory(self, config: Config, split: Split, room: float) -> RankMemory:
        """Of a rank; ``config`` is the question's with a layout's keys, ``room`` its bytes."""
        load = most_of_a_step(config, self.student.shape)
        models = self.student, self.teacher
        return expected_memory(config, *models, split, self.hardware, load, room=room)

    def lengths(self, step: int) -> Lengths:
        budget = generation_budget(step, self.config.curriculum, self.config.rollout)
        return Lengths(
            prompt=self.prompt,
            response=min(budget, self.response),
            longest=budget,
            per_pass=self.per_pass,
        )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """A whole run."""

    hours: float
    gpu_hours: float
    rollout_tokens: float
    trained_tokens: float
    flops: float  # everything that is computed
    flops_paper: float


def seconds_of_step(
    question: Question, config: Config, split: Split, memory: RankMemory, lengths: Lengths
) -> dict[str, float]:
    """By phase. ``config`` is the question's with the layout's keys."""
    work = question.counter.count(lengths, recompute=config.model.recompute)
    machine, shape = question.machine, question.student.shape
    item = resolve_dtype(config.model.dtype, question.hardware, shape).itemsize
    sequences = _sequences(config)
    share = sequences / split.data
    budget = config.update.tokens_per_microbatch
    asked = ModelWork(
        layers=question.teacher.shape.layers,
        hidden=question.teacher.shape.hidden,
        item=resolve_dtype(
            config.teacher.dtype, question.hardware, question.teacher.shape
        ).itemsize,
        flops=work.teacher_flops,
        tokens=work.finished_tokens,
    )
    trained = ModelWork(
        layers=shape.layers,
        hidden=shape.hidden,
        item=item,
        flops=work.update_flops / work.states,
        tokens=work.packed_tokens / work.states,
    )
    teacher = step_time.teacher_seconds(
        asked,
        split,
        machine,
        sequences=share if work.teacher_flops else 0.0,
        rows=max(1.0, share * work.finished_tokens / budget),
    )
    update = _update(config, shape, split, memory, work, lengths, item)
    seconds = {
        "rollout": step_time.rollout_seconds(
            _decoding(config, shape, split, memory, work, lengths, item), split, machine
        ),
        "teacher": teacher,
        "update": step_time.update_seconds(trained, update, split, machine),
        "save": step_time.save_seconds(_kept(config, split, memory), machine),
    }
    return {phase: seconds[phase] * question.corrections.get(phase, 1.0) for phase in PHASES}


def totals(question: Question, config: Config, split: Split, memory: RankMemory) -> Totals:
    """The sums over all steps, whose responses grow with the curriculum."""
    sequences, uses = _sequences(config), config.train.inner_epochs
    seconds, made, trained, flops = 0.0, 0.0, 0.0, 0.0
    by_lengths: dict[Lengths, int] = {}
    for step in range(1, question.steps + 1):
        lengths = question.lengths(step)
        by_lengths[lengths] = by_lengths.get(lengths, 0) + 1
    for lengths, steps in by_lengths.items():
        of_step = seconds_of_step(question, config, split, memory, lengths)
        work = question.counter.count(lengths, recompute=config.model.recompute)
        seconds += steps * step_time.total(of_step)
        many = steps * sequences
        made += many * lengths.response
        trained += many * uses * work.trained_tokens
        flops += many * (work.rollout_flops + work.teacher_flops + uses * work.update_flops)
    return Totals(
        hours=seconds / 3600,
        gpu_hours=seconds / 3600 * question.gpus,
        rollout_tokens=made,
        trained_tokens=trained,
        flops=flops,
        flops_paper=paper_flops(question.student.shape, round(trained)),
    )


def _sequences(config: Config) -> int:
    return config.rollout.prompts_per_step * config.rollout.responses_per_prompt


def _decoding(
    config: Config,
    shape: ModelShape,
    split: Split,
    memory: RankMemory,
    work: SequenceWork,
    lengths: Lengths,
    item: int,
) -> Decoding:
    """The rollout lasts until the longest response is done, or until all slots are."""
    each = -(-_sequences(config) // (split.data * split.context))
    token = kv_bytes_per_token(shape, split, item)
    # A slot holds pages: on average a prompt, half of a response and half of the last page.
    own = token * (lengths.prompt + (lengths.response + PAGE_TOKENS) / 2)
    held = max(1.0, memory.sizes("rollout").get(CACHE, 0.0) / own)
    block, slots = config.rollout.block_size, min(config.rollout.slots, each, held)
    per_token = 1 / lengths.per_pass
    mean = each * lengths.response * per_token / slots
    passes = 1 + max(lengths.longest * per_token, mean)
    live = mean * slots / passes
    whole = Split(tensor=split.tensor, expert=split.expert, data=split.data)
    tokens = live * block * (1 + lengths.per_pass / block)
    numbers = rank_numbers(shape, whole)
    hit = 1.0
    if shape.experts is not None:
        idle = 1 - shape.experts.per_token / shape.experts.count
        hit = 1 - idle ** (tokens * split.expert)
    positions = live * (lengths.prompt + lengths.response / 2)
    return Decoding(
        passes=passes,
        flops=each * work.rollout_flops / split.pipeline,
        weight_bytes=(numbers.dense + hit * numbers.experts) * item,
        cache_bytes=positions * kv_bytes_per_token(shape, whole, item),
        layers=shape.layers,
        pass_bytes=tokens * shape.hidden * item,
    )


def _update(
    config: Config,
    shape: ModelShape,
    split: Split,
    memory: RankMemory,
    work: SequenceWork,
    lengths: Lengths,
    item: int,
) -> Update:
    sequences, size = round(_sequences(config) * work.states), config.optimizer.batch_size
    number = updates_per_step(sequences, size, config.train.inner_epochs)
    of_replica = -(-min(size, sequences) // split.data)
    replicas = min(split.data, min(size, sequences))
    packed = of_replica * work.packed_tokens / work.states
    longest = _slowest(lengths, replicas, of_replica)
    numbers = memory.parts["gradients"] / 4
    return Update(
        number=number,
        forwards=1 if config.model.recompute == "false" else 2,
        sequences=of_replica,
        longest=longest,
        rows=max(1.0, packed / config.update.tokens_per_microbatch),
        weights=numbers,
        weight_bytes=numbers * item,
        state_bytes=memory.parts[OPTIMIZER],
    )


def _slowest(lengths: Lengths, replicas: int, sequences: int) -> float:
    """What the replica with most work has, over the mean. Lengths are taken to be exponential up to
    the limit, so that the largest of n is the mean times 1 + 1/2 + ... + 1/n.
    """
    largest = sum(1 / i for i in range(1, replicas + 1))
    times = min(lengths.longest / lengths.response, 1 + (largest - 1) / sequences)
    mean = lengths.prompt + 2 * lengths.response
    return (lengths.prompt + 2 * lengths.response * times) / mean


def _kept(config: Config, split: Split, memory: RankMemory) -> Kept:
    moved = memory.parts.get(TEACHER_LAYERS, 0.0)
    if config.optimizer.cpu_offload:
        moved += memory.parts[OPTIMIZER]
    copies = split.data * split.context
    return Kept(
        to_host=moved,
        saved=memory.parts["student weights"] / copies + memory.parts[OPTIMIZER],
        save_every=config.checkpoint.every,
        waits_for_disk=not config.checkpoint.async_save,
    )
