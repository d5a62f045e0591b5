"""What a training command would do, without doing it: layout, shapes and memory of each rank.

Needs no GPU, and no weights for a model that is named after a published one or that the quickstart
makes: their shapes are known.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.config import Config
from megatron_opdlm.errors import InputError
from megatron_opdlm.planning.layout import model_layout

if TYPE_CHECKING:
    from megatron_opdlm.planning.rank_memory import Split
    from megatron_opdlm.run.build import ModelSource

GIB = 2**30
USUAL_RANKS = 8  # of a machine that trains
# Where launch/quickstart.sh leaves its model, and what stands for that until it is there.
QUICKSTART = Path("runs/quickstart/imported")
QUICKSTART_SHAPE = Path(__file__).parents[2] / "configs" / "quickstart_model"


def fewest_ranks(config: Config) -> int:
    """The smallest number of ranks that the layout divides."""
    m = config.model
    stages = m.tensor_parallel * m.pipeline_parallel
    return stages * math.lcm(m.context_parallel, m.expert_parallel)


def usual_ranks(config: Config) -> int:
    """Those of one usual machine, or as many more as the layout needs."""
    fewest = fewest_ranks(config)
    return fewest * -(-USUAL_RANKS // fewest)


def describe(config: Config, world_size: int) -> str:
    """Check models, layout and prompts as training would, and say what each rank would hold.

    Raises InputError exactly where training would before it builds anything; a model that is not
    there yet is allowed where it is named after a published one, and said.
    """
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.model_files.shape import padded_vocab
    from megatron_opdlm.run import build
    from megatron_opdlm.run.expected_memory import split_of
    from megatron_opdlm.run.run_directory import check_run_directory

    check_run_directory(config)
    source, teacher, notes = open_or_public(config, world_size)
    layout = model_layout(config)
    split = split_of(config, world_size)
    hardware = select_hardware()
    shape = source.shape
    lines = [
        f"hardware     {hardware.reason}",
        build.describe_kernels(config, hardware).replace("kernels: ", "kernels      "),
        build.describe_decoding(config, shape, hardware).replace("rollout: ", "rollout      "),
        f"ranks        {world_size} = tensor {split.tensor} x pipeline {split.pipeline} x "
        f"context {split.context} x data {split.data}"
        + (f", experts over {split.expert}" if split.expert > 1 else "")
        + (", sequence parallel" if layout.sequence_parallel else ""),
        f"student      {shape.parameters:,} parameters: {shape.layers} layers, "
        f"hidden {shape.hidden}, {shape.heads}/{shape.groups} heads x {shape.head_dim}, "
        + _feed_forward(source),
        f"vocabulary   {shape.vocab_size} ids in "
        f"{padded_vocab(shape.vocab_size, layout.tensor)} rows, "
        f"mask token {source.vocabulary.mask_id}, end tokens {list(source.vocabulary.end_ids)}",
        *notes,
        *_work(config, source, weights_are_there=not notes),
        *_memory(config, source, teacher, split),
    ]
    return "\n".join(lines)


def open_or_public(config: Config, world_size: int) -> "tuple[ModelSource, ModelSource, list[str]]":
    """Both models, checked; and a note where a published shape stands in for one."""
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.run import build

    paths = [("model.path", config.model.path), ("teacher.path", config.teacher.path)]
    missing = [(key, path) for key, path in paths if path and not Path(path).is_dir()]
    if not missing:
        return *build.open_pair(config, world_size), []
    build.kernels_of(config, select_hardware())
    sources, notes = [], []
    for key, path in paths:
        if not path:
            sources.append(sources[0])
            continue
        source, note = _open(key, path, config.model.mask_token_id)
        build.require_layout(config, source, key, world_size)
        sources.append(source)
        notes += note
    student, teacher = sources
    build.require_exports(config, student)
    if student.vocabulary.size != teacher.vocabulary.size:
        build.require_same_tokens(student, teacher)
    return student, teacher, notes


def _open(key: str, path: str, mask: int | None) -> "tuple[ModelSource, list[str]]":
    from megatron_opdlm.model_files.shape import read_shape
    from megatron_opdlm.model_files.vocabulary import read_vocabulary
    from megatron_opdlm.planning.public_shapes import (
        public_name,
        public_names,
        public_shape,
        public_vocabulary,
    )
    from megatron_opdlm.run import build

    if Path(path).exists():
        return build.open_model(path, key, mask), []
    name = public_name(path)
    if Path(path) == QUICKSTART:
        shape, vocabulary = read_shape(QUICKSTART_SHAPE), read_vocabulary(QUICKSTART_SHAPE, mask)
        why = "launch/quickstart.sh makes it"
    elif name is not None:
        shape = public_shape(name)
        vocabulary, why = public_vocabulary(name, mask), f"the public shape of {name}"
    else:
        raise InputError(
            f"{key}={path} is not a directory: give a Hugging Face model directory or a Megatron "
            f"checkpoint, or for --dry-run a path named after one of {', '.join(public_names())}"
        )
    source = build.ModelSource(
        directory=Path(path), shape=shape, vocabulary=vocabulary, contract=None, low_rank=None
    )
    return source, [f"note         {key}={path} is not there yet: {why}"]


def _feed_forward(source: "ModelSource") -> str:
    experts = source.shape.experts
    if experts is None:
        return f"ffn {source.shape.ffn}"
    return (
        f"{experts.per_token} of {experts.count} experts x {experts.ffn}, "
        f"{source.shape.active_parameters:,} parameters work on a token"
    )


def _work(config: Config, source: "ModelSource", *, weights_are_there: bool) -> list[str]:
    """Prompts and steps; without a tokenizer, only what the configuration says of them."""
    from megatron_opdlm.run import build

    each = (
        f"{config.rollout.prompts_per_step} prompts x "
        f"{config.rollout.responses_per_prompt} responses"
    )
    if weights_are_there:
        plan = build.build_plan(config, source)
        return [
            f"prompts      {plan.prompts.summary}",
            f"steps        {plan.steps_told} of {each}",
            *plan.notes,
        ]
    there = "there" if Path(config.data.path).exists() else "not there yet"
    steps = config.train.stop_after or config.train.steps
    count = str(steps) if steps > 0 else f"as many as {config.data.epochs} epochs of the data take,"
    return [
        f"prompts      data.path={config.data.path} is {there}; not read: that needs the "
        "model's tokenizer",
        f"steps        {count} of {each}",
    ]


def _memory(
    config: Config, source: "ModelSource", teacher: "ModelSource", split: "Split"
) -> list[str]:
    """Bytes of the fullest rank, by what they are for and by phase."""
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.planning.phase_memory import CACHE, PHASES
    from megatron_opdlm.run import build
    from megatron_opdlm.run.expected_memory import expected_memory, most_of_a_step

    hardware = select_hardware()
    load = most_of_a_step(config, source.shape)
    memory = expected_memory(config, source, teacher, split, hardware, load)
    item = build.resolve_dtype(config.model.dtype, hardware, source.shape).itemsize
    kept = memory.parts.get(CACHE, 0.0)
    lasting = {name: size for name, size in memory.parts.items() if name != CACHE}
    peaks = ", ".join(f"{phase} {memory.peak(phase) / GIB:.3f}" for phase in PHASES)
    return [
        "memory of the fullest rank, GiB, estimated from shapes; activations come on top:",
        *(f"  {name:<19}{size / GIB:.3f}" for name, size in lasting.items()),
        f"  in the rollout     {(memory.held('rollout') - kept) / GIB:.3f} and the KV cache",
        f"  in the update      {memory.held('update') / GIB:.3f} and the activations"
        + (f"; {kept / GIB:.3f} of it is the KV cache, which stays" if kept else ""),
        _kv_cache(config, source, split, item),
        f"  peaks              {peaks} on this hardware, for the longest responses; on GPUs: "
        "opdlm plan",
    ]


def _kv_cache(config: Config, source: "ModelSource", split: "Split", item_bytes: int) -> str:
    """What the cache takes when every slot is as long as it can get, beside its budget."""
    from megatron_opdlm.planning.rank_memory import kv_bytes_per_token

    rollout = config.rollout
    token = kv_bytes_per_token(source.shape, split, item_bytes)
    slots, longest = _slots(config, source, split)
    budget = (
        f"rollout.kv_cache_tokens={rollout.kv_cache_tokens}: "
        f"{rollout.kv_cache_tokens * token / GIB:.3f} GiB"
        if rollout.kv_cache_tokens
        else "half of the memory that is free then"
    )
    return (
        f"  KV cache           {token * longest * slots / GIB:.3f} for {slots} sequences of "
        f"{longest} tokens; budget: {budget}"
    )


def _slots(config: Config, source: "ModelSource", split: "Split") -> tuple[int, int]:
    """Sequences that a copy of the model decodes at once, and the tokens of the longest."""
    rollout = config.rollout
    sequences = rollout.prompts_per_step * rollout.responses_per_prompt
    limit = config.model.max_positions or source.shape.max_positions
    longest = min(limit, (config.data.max_prompt_tokens or limit) + rollout.max_new_tokens)
    return min(rollout.slots, -(-sequences // (split.data * split.context))), longest
