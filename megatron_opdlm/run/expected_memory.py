"""Memory that a rank of a run comes to need, from configuration, shapes and layout alone."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_opdlm.config import Config
from megatron_opdlm.diffusion.blocks import sequence_end
from megatron_opdlm.engine.cache_budget import CACHE_SHARE
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.model.flops import low_rank_parameters, packed_row_pairs
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.planning.activation_memory import (
    Build,
    LayerMemory,
    Row,
    vocabulary_columns,
)
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.planning.phase_memory import (
    CACHE,
    PHASES,
    RankMemory,
    Work,
    rollout_work,
    teacher_work,
    update_work,
)
from megatron_opdlm.planning.rank_memory import (
    GRADIENT_BYTES,
    RankNumbers,
    Split,
    kv_bytes_per_token,
    optimizer_bytes_per_number,
    rank_numbers,
)
from megatron_opdlm.run import build
from megatron_opdlm.storage.model_source import ModelSource

OPTIMIZER, TEACHER, TEACHER_LAYERS = "optimizer", "teacher weights", "teacher layers"


def split_of(config: Config, world_size: int) -> Split:
    """Over how many ranks things are divided. InputError where the layout does not divide them."""
    layout = model_layout(config)
    return Split(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        expert=layout.expert,
        data=layout.data_parallel(world_size),
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """The most that a step brings."""

    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response
    sequences: int


def most_of_a_step(config: Config, shape: ModelShape) -> Load:
    """What the configuration allows, whatever the data are."""
    rollout = config.rollout
    limit = min(shape.max_positions, config.model.max_positions or shape.max_positions)
    response = min(rollout.max_new_tokens, limit - rollout.block_size)
    return Load(
        prompt=min(config.data.max_prompt_tokens or limit, limit - response),
        response=response,
        sequences=rollout.prompts_per_step * rollout.responses_per_prompt,
    )


def expected_memory(
    config: Config,
    student: ModelSource,
    teacher: ModelSource,
    split: Split,
    hardware: Hardware,
    load: Load,
    *,
    room: float = math.inf,
) -> RankMemory:
    """Peaks of the fullest rank, on this hardware, where a step brings no more than ``load``.

    ``room``: bytes of the device, of which a cache without a budget of its own takes half of what
    is free, and no more than all slots need.
    """
    kernels = build.kernels_of(config, hardware)
    low_rank = build.low_rank_of(config)
    item = build.resolve_dtype(config.model.dtype, hardware, student.shape).itemsize
    teacher_item = build.resolve_dtype(config.teacher.dtype, hardware, teacher.shape).itemsize
    on_host = hardware.device.type == "cpu"
    computed = Build(
        item=item,
        spec=kernels[0].spec,
        attention=kernels[0].attention,
        on_host=on_host,
        recompute=config.model.recompute,
        sequence_parallel=config.model.sequence_parallel,
        low_rank=low_rank,
        sums_head=not build.overlaps_reduction(config, hardware),
    )
    asked = Build(
        item=teacher_item,
        spec=kernels[1].spec,
        attention=kernels[1].attention,
        on_host=on_host,
        sequence_parallel=config.model.sequence_parallel,
    )
    layer = LayerMemory(student.shape, split, computed)
    teacher_layer = LayerMemory(teacher.shape, split, asked)
    work = _work(config, layer, teacher_layer, split, hardware, load)
    trained = _trained(config, student.shape, split)
    parts, away = _parts(config, student, teacher, split, hardware, trained)
    cache, keeps_cache = _kv_cache(config, student.shape, split, hardware, load)
    if keeps_cache:
        parts[CACHE], cache = cache, 0.0
    targets = 0.0
    if config.loss.kind != "nll" and not config.teacher.offload_targets:
        targets = parts["targets"] = _target_bytes(config, teacher_layer, split, load)
    held = sum(size for part, size in parts.items() if part not in away["rollout"])
    if config.rollout.kv_cache_tokens is None:
        cache = min(cache, CACHE_SHARE * max(room - held, 0.0))
    # Gloo copies what it exchanges; a rank alone exchanges nothing.
    copies = hardware.device.type == "cpu" and split.data * split.context > 1
    return RankMemory(
        parts=parts,
        away=away,
        work={
            "rollout": {
                **rollout_work(layer, work, cache),
                "weights laid out": _laid_out(config, student.shape, split, hardware),
            },
            # Those of the step before are still there.
            "teacher": {**teacher_work(teacher_layer, work), "targets being made": targets},
            "update": update_work(
                layer,
                work,
                gradients_copied=GRADIENT_BYTES * trained.total if copies else 0.0,
            ),
        },
    )


def _trained(config: Config, shape: ModelShape, split: Split) -> RankNumbers:
    """Numbers that get gradients and optimizer state."""
    low_rank = build.low_rank_of(config)
    if low_rank is None:
        return rank_numbers(shape, split)
    return RankNumbers(dense=low_rank_parameters(shape, low_rank) / split.tensor / split.pipeline)


def _parts(
    config: Config,
    student: ModelSource,
    teacher: ModelSource,
    split: Split,
    hardware: Hardware,
    trained: RankNumbers,
) -> tuple[dict[str, float], dict[str, frozenset[str]]]:
    """What lasts, and which of it waits in host memory in a phase."""
    item = build.resolve_dtype(config.model.dtype, hardware, student.shape).itemsize
    added = trained.total if config.lora.rank else 0.0
    o = config.optimizer
    states = {
        "main_params": o.main_params_dtype,
        "exp_avg": o.exp_avg_dtype,
        "exp_avg_sq": o.exp_avg_sq_dtype,
    }
    parts = {
        "student weights": (rank_numbers(student.shape, split).total + added) * item,
        "gradients": trained.total * GRADIENT_BYTES,
        OPTIMIZER: trained.optimizer_share(split) * optimizer_bytes_per_number(item, states),
    }
    parts |= _teacher_parts(config, student, teacher, split, hardware)
    # On a CPU nothing moves; a layout for GPUs is looked at there, too.
    optimizer = {OPTIMIZER} if config.optimizer.cpu_offload else set()
    layers = {TEACHER_LAYERS}
    away = {
        "rollout": frozenset(optimizer | layers),
        "teacher": frozenset(optimizer),
        "update": frozenset(layers),
    }
    assert set(away) == set(PHASES)
    return parts, away


def _teacher_parts(
    config: Config, student: ModelSource, teacher: ModelSource, split: Split, hardware: Hardware
) -> dict[str, float]:
    """The teacher's weights; its layers by themselves where they can wait in host memory."""
    if config.loss.kind == "nll" or build.shares_base(config, student, hardware):
        return {TEACHER: 0.0}
    numbers = rank_numbers(teacher.shape, split).total
    share = numbers / teacher.shape.parameters
    weights = build.teacher_bytes(config, teacher, hardware) * share
    if not config.teacher.offload_weights:
        return {TEACHER: weights}
    item = build.resolve_dtype(config.teacher.dtype, hardware, teacher.shape).itemsize
    ends = 1 if split.pipeline > 1 or teacher.shape.tied else 2
    rest = ends * vocabulary_columns(teacher.shape, split) * teacher.shape.hidden * item
    return {TEACHER_LAYERS: weights - rest, "teacher vocabulary": rest}


def _target_bytes(config: Config, teacher: LayerMemory, split: Split, load: Load) -> float:
    """What the teacher's answers of a step take on a rank, if every token is asked for."""
    positions = -(-load.sequences // split.data) * load.response / split.context
    if config.teacher.targets == "top_k":
        return positions * 8 * config.loss.top_k
    return positions * teacher.shape.hidden * teacher.build.item


def _kv_cache(
    config: Config, shape: ModelShape, split: Split, hardware: Hardware, load: Load
) -> tuple[float, bool]:
    """Of the cache that holds every slot's longest sequence, or of the given budget; and whether it
    stays from one rollout to the next.
    """
    rollout = config.rollout
    dtype = build.resolve_dtype(config.model.dtype, hardware, shape)
    each = -(-load.sequences // (split.data * split.context))
    positions = sequence_end(load.prompt, load.response, rollout.block_size)
    tokens = min(rollout.slots, each) * positions
    captures = hardware.captures is not None and rollout.graphs and rollout.attention != "buckets"
    keeps = rollout.kv_cache_tokens is not None and captures and shape.experts is None
    if rollout.kv_cache_tokens is not None:
        tokens = min(tokens, rollout.kv_cache_tokens)
    return tokens * kv_bytes_per_token(shape, split, dtype.itemsize), keeps


def _laid_out(config: Config, shape: ModelShape, split: Split, hardware: Hardware) -> float:
    """The layers' weights once more, where a CPU multiplies in bfloat16 (``hardware.laid_out``)."""
    dtype = build.resolve_dtype(config.model.dtype, hardware, shape)
    on_cpu = hardware.device.type == "cpu"
    if not on_cpu or dtype is not torch.bfloat16 or hardware.large_dtype is not dtype:
        return 0.0
    ends = (1 if split.pipeline > 1 or shape.tied else 2) * vocabulary_columns(shape, split)
    return (rank_numbers(shape, split).total - ends * shape.hidden) * dtype.itemsize


def _work(
    config: Config,
    student: LayerMemory,
    teacher: LayerMemory,
    split: Split,
    hardware: Hardware,
    load: Load,
) -> Work:
    """Rows as full as they can get."""
    block = config.rollout.block_size
    budget = config.update.tokens_per_microbatch or hardware.row_tokens
    finished = load.prompt + load.response
    packed = finished - block + load.response
    of_update = -(-min(config.optimizer.batch_size, load.sequences) // split.data)
    of_step = -(-load.sequences // split.data)
    tokens = max(packed, min(budget, of_update * packed))
    asked = max(finished, min(budget, of_step * finished))
    pairs, causal = 0, 0
    if student.build.attention == "dense":
        pairs = dense_pairs(load.prompt, load.response, block)
    if teacher.build.attention == "dense":
        causal = dense_causal_pairs(finished)
    context = split.context
    slots = min(config.rollout.slots, -(-of_step // context))
    return Work(
        student=Row(
            tokens=tokens / context,
            positions=tokens / packed * load.response / context,
            pairs=tokens / packed * pairs / context,
        ),
        teacher=Row(
            tokens=asked / context,
            positions=asked / finished * load.response / context,
            pairs=asked / finished * causal / context,
        ),
        rows_in_flight=min(split.pipeline, -(-of_update * packed // tokens)),
        window_tokens=max(
            min(config.rollout.prefill_tokens, slots * load.prompt) + slots * block,
            2 * slots * block,
        ),
        drawn=slots * block,
        chunk_rows=config.loss.chunk_rows or hardware.projection_rows,
    )


@lru_cache
def dense_pairs(prompt: int, response: int, block: int) -> int:
    """(query, key) pairs that the dense attention computes for one sequence's row."""
    clean = prompt + response - block
    positions = torch.cat([torch.arange(clean), torch.arange(prompt, prompt + response)])
    is_clean = torch.arange(len(positions)) < clean
    return packed_row_pairs("dense", [len(positions)], positions // block, is_clean)


@lru_cache
def dense_causal_pairs(tokens: int) -> int:
    """The same for a finished sequence."""
    return packed_row_pairs("dense", [tokens])
