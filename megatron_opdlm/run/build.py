"""Resolved configuration -> live objects. What can be checked before a process group exists is
checked first.
"""

from pathlib import Path

import torch

import megatron_opdlm.hardware  # noqa: F401 -- before megatron-core

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from megatron_opdlm import launcher
from megatron_opdlm.checkpoint import Checkpoints, dtype_name, load_model
from megatron_opdlm.config import Config, to_yaml
from megatron_opdlm.divergence import Divergence
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware, select_hardware
from megatron_opdlm.model import lora
from megatron_opdlm.model.decode_choice import choose_decode_attention
from megatron_opdlm.model.flops import layer_linear_parameters
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model.kernels import Kernels, choose_kernels, reason
from megatron_opdlm.model.quantization import require_modelopt
from megatron_opdlm.model_files.formats import check_format
from megatron_opdlm.model_files.manifest import BlockContract, LowRank
from megatron_opdlm.model_files.shape import ModelShape, check_layout
from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.off_policy import Recorded, require_responses
from megatron_opdlm.optimizer import fuse_gradients, optimizer_config
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.prompts import PromptOrder, PromptSet, load_prompts
from megatron_opdlm.step_plan import StepPlan
from megatron_opdlm.storage.model_source import ModelSource, open_model, require_same_tokens
from megatron_opdlm.update import Objective, Student

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_pair(config: Config, world_size: int | None = None) -> tuple[ModelSource, ModelSource]:
    """Student's and teacher's directories, checked against each other and against the layout.

    ``world_size`` None: the number of ranks that were started.
    """
    if config.teacher.quantization == "fp8":
        require_modelopt()
    mask = config.model.mask_token_id
    student = open_model(config.model.path, "model.path", mask)
    teacher = student
    if config.teacher.path:  # never reads a mask token, so it needs none of its own
        teacher = open_model(config.teacher.path, "teacher.path", need_mask=False)
    require_same_tokens(student, teacher)
    if config.loss.top_k > student.shape.vocab_size:
        raise InputError(
            f"loss.top_k={config.loss.top_k} exceeds the vocabulary of {student.shape.vocab_size}; "
            "use less, or 0 for all of it"
        )
    kernels_of(config, select_hardware())
    ranks = launcher.world_size() if world_size is None else world_size
    for source, key in ((student, "model.path"), (teacher, "teacher.path")):
        require_layout(config, source, key, ranks)
    require_exports(config, student)
    return student, teacher


def kernels_of(config: Config, hardware: Hardware) -> tuple[Kernels, Kernels]:
    """What computes the student and the teacher. InputError where that cannot run here.

    An FP8 teacher has Megatron's own layers, whose linears ModelOpt can multiply in FP8.
    """
    fp8 = config.teacher.quantization == "fp8"
    student, teacher = (
        choose_kernels(
            "local" if fp8 and section is config.teacher else config.model.spec,
            config.attention.backend,
            resolve_dtype(section.dtype, hardware),
            hardware,
            causal=section is config.teacher,
        )
        for section in (config.model, config.teacher)
    )
    return student, teacher


def describe_kernels(config: Config, hardware: Hardware) -> str:
    """One line for the log: what computes the models, and why."""
    student, teacher = kernels_of(config, hardware)
    return f"kernels: student {student}; teacher {teacher}; {reason(hardware)}"


def describe_decoding(config: Config, shape: ModelShape, hardware: Hardware) -> str:
    """One line for the log: what attends in the rollout, and why."""
    dtype = resolve_dtype(config.model.dtype, hardware, shape)
    way = choose_decode_attention(config.rollout.attention, dtype, shape.head_dim, hardware)
    return f"rollout: {way}"


def resolve_dtype(name: str, hardware: Hardware, shape: ModelShape | None = None) -> torch.dtype:
    """``auto`` is the hardware's choice. It needs the ``shape`` on a CPU only, whose kernels are
    the same for every type.
    """
    if name != "auto":
        return _DTYPES[name]
    return hardware.dtype_of(shape.parameters) if shape else hardware.dtype


def build_plan(config: Config, student: ModelSource) -> StepPlan:
    """Prompts of ``data.path``, their order, and what each step makes of them."""
    prompts = _load_prompts(config, student, "data.path", config.data.path)
    order = _order(config, prompts, config.rollout.prompts_per_step)
    steps, stop_after = config.train.steps, config.train.stop_after
    planned = order.total_steps if steps < 0 else min(steps, order.total_steps)
    return StepPlan(
        config=config,
        vocabulary=student.vocabulary,
        max_positions=_max_positions(config, student),
        prompts=prompts,
        order=order,
        recorded=_recorded(config, student, prompts, order),
        planned_steps=planned,
        total_steps=min(stop_after, order.total_steps) if stop_after else planned,
    ).validate()


def _max_positions(config: Config, student: ModelSource) -> int:
    """Tokens of a prompt and its response."""
    own = student.shape.max_positions
    return min(own, config.model.max_positions or own)


def _load_prompts(config: Config, student: ModelSource, option: str, path: str) -> PromptSet:
    limit = _max_positions(config, student) - config.rollout.block_size
    return load_prompts(
        path,
        load_tokenizer(student.files),
        vocab_size=student.shape.vocab_size,
        enable_thinking=config.data.enable_thinking,
        max_prompt_tokens=min(limit, config.data.max_prompt_tokens or limit),
        option=option,
    )


def _order(config: Config, prompts: PromptSet, each_step: int) -> PromptOrder:
    data = config.data
    return PromptOrder(
        len(prompts.prompts), each_step, data.epochs, config.train.seed, data.shuffle
    )


def _recorded(
    config: Config, student: ModelSource, prompts: PromptSet, order: PromptOrder
) -> Recorded:
    """Where recorded responses come from: ``mixing.path``, else the step's own prompts. InputError
    where a row has none and the run will ask for one.
    """
    mixing, samples = config.mixing, config.rollout.responses_per_prompt
    option = f"data.path={config.data.path}"
    if mixing.path:
        option = f"mixing.path={mixing.path}"
        prompts = _load_prompts(config, student, "mixing.path", mixing.path)
        order = _order(config, prompts, config.rollout.prompts_per_step * samples)
        samples = 1
    if mixing.fraction or (mixing.end_fraction and mixing.kind != "constant"):
        require_responses(prompts.prompts, option)
    return Recorded(prompts=prompts, order=order, samples_per_prompt=samples)


def build_teacher(source: ModelSource, config: Config, hardware: Hardware) -> LanguageModel:
    """The frozen autoregressive model, on the same layout as the student."""
    dtype = resolve_dtype(config.teacher.dtype, hardware, source.shape)
    kernels = kernels_of(config, hardware)[1]
    teacher = build_model(
        source.shape, model_layout(config), dtype, hardware, name="teacher.path", kernels=kernels
    )
    load_model(teacher, source.directory)
    return teacher.requires_grad_(False).eval()


def teacher_bytes(config: Config, teacher: ModelSource, hardware: Hardware) -> int:
    """Memory of all of a second model's weights."""
    size = resolve_dtype(config.teacher.dtype, hardware, teacher.shape).itemsize
    linears = layer_linear_parameters(teacher.shape)
    if config.teacher.quantization == "none":
        return teacher.shape.parameters * size
    return (teacher.shape.parameters - linears) * size + linears


def shares_base(config: Config, student: ModelSource, hardware: Hardware) -> bool:
    """Whether the student's frozen base is the teacher: the same weights in the same type."""
    same_path = config.teacher.path in ("", config.model.path)
    names, shape = (config.model.dtype, config.teacher.dtype), student.shape
    types = {resolve_dtype(name, hardware, shape) for name in names}
    return (
        config.lora.rank > 0
        and config.lora.share_teacher
        and same_path
        and len(types) == 1
        and config.teacher.quantization == "none"
        and student.low_rank is None  # else the teacher is the base with those terms merged
    )


def choose_teacher(
    student: Student,
    source: ModelSource,
    teacher_source: ModelSource,
    config: Config,
    hardware: Hardware,
) -> LanguageModel:
    """The student's own base where that is the teacher, else a second model."""
    if shares_base(config, source, hardware):
        return student.model
    return build_teacher(teacher_source, config, hardware)


def low_rank_of(config: Config) -> LowRank | None:
    """The low-rank terms that are trained; None: all weights are."""
    c = config.lora
    return LowRank(rank=c.rank, alpha=c.alpha, targets=tuple(c.targets)) if c.rank else None


def build_student(
    source: ModelSource, config: Config, hardware: Hardware, *, load: bool = True
) -> Student:
    """The trained model with gradient reduction and the distributed optimizer. ``load`` False
    leaves the weights unfilled. With low-rank terms only those are trained.
    """
    low_rank = low_rank_of(config)
    dtype = resolve_dtype(config.model.dtype, hardware, source.shape)
    model = build_model(
        source.shape,
        model_layout(config),
        dtype,
        hardware,
        name="model.path",
        recompute=config.model.recompute,
        kernels=kernels_of(config, hardware)[0],
    )
    if low_rank:
        lora.attach(model, low_rank, seed=config.train.seed)
    if load:
        load_model(model, source.directory)
    if low_rank:
        lora.freeze_base(model)
    wrapped = model if dtype is torch.float32 else Float16Module(model.config, model)
    # Weights are gathered at once, never during the next forward: the output layer's are read
    # outside of its module, and captured passes read all of them, where nobody would wait.
    overlaps = overlaps_reduction(config, hardware)
    reduction = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlaps,
    )
    ddp = DistributedDataParallel(model.config, reduction, wrapped)
    if overlaps:  # of the last microbatch only
        model.config.no_sync_func = ddp.no_sync
    fuse_gradients(model)
    adam = optimizer_config(config, dtype, hardware)
    return Student(model=model, ddp=ddp, optimizer=get_megatron_optimizer(adam, [ddp]))


def overlaps_reduction(config: Config, hardware: Hardware) -> bool:
    """Whether sums of gradients overlap the backward pass: where that was tested, which is not
    between pipeline stages.
    """
    return hardware.overlaps_reduction and config.model.pipeline_parallel == 1


def build_objective(config: Config, teacher: LanguageModel | None) -> Objective:
    """What the update minimises."""
    loss = config.loss
    divergence = Divergence(
        kind=loss.kind,
        reverse_weight=loss.reverse_weight,
        jsd_alpha=loss.jsd_alpha,
        top_k=loss.top_k,
        top_k_tail=loss.top_k_tail,
        teacher_temperature=config.teacher.temperature,
        teacher_top_p=config.teacher.top_p,
    )
    chunk_rows = loss.chunk_rows or select_hardware().projection_rows
    return Objective(
        divergence=divergence,
        chunk_rows=chunk_rows,
        teacher=teacher,
        keep_top_k=config.teacher.targets == "top_k",
    )


def build_checkpoints(config: Config, source: ModelSource, hardware: Hardware) -> Checkpoints:
    """Where and how this run saves."""
    return Checkpoints(
        directory=Path(config.train.out) / "checkpoints",
        keep=config.checkpoint.keep,
        source=source.files,
        config_yaml=to_yaml(config),
        dtype=dtype_name(resolve_dtype(config.model.dtype, hardware, source.shape)),
        block_contract=_contract(config, source),
        low_rank=low_rank_of(config),
        in_background=config.checkpoint.async_save,
    )


def _contract(config: Config, source: ModelSource) -> BlockContract:
    """What decodes the student as it is trained."""
    return BlockContract(
        mask_token_id=source.vocabulary.mask_id,
        block_size=config.rollout.block_size,
        block_alignment=config.states.block_alignment,
        logit_shift=config.loss.logit_shift,
    )


def require_exports(config: Config, student: ModelSource) -> None:
    """InputError where a format of ``checkpoint.export`` could not hold the student."""
    contract = _contract(config, student)
    for name in config.checkpoint.export:
        check_format(name, contract, student.shape, flag="checkpoint.export=")


def require_layout(config: Config, source: ModelSource, key: str, world_size: int) -> None:
    """The layout must divide the ranks and the model's heads, groups, feed-forward width and
    layers.
    """
    layout = model_layout(config)
    layout.data_parallel(world_size)
    check_layout(source.shape, layout.tensor, layout.pipeline, key, layout.context, layout.expert)
    if source.shape.experts is not None:
        _check_experts(config, key)


def _check_experts(config: Config, key: str) -> None:
    """What a mixture of experts asks of the other options."""
    m, fp8 = config.model, config.teacher.quantization
    if m.tensor_parallel > 1 and not m.sequence_parallel:
        raise InputError(
            f"{key} has experts, which with model.tensor_parallel={m.tensor_parallel} need "
            "model.sequence_parallel=true; set it, or use model.tensor_parallel=1"
        )
    dense = [target for target in config.lora.targets if target.startswith("linear_fc")]
    if config.lora.rank and dense:
        raise InputError(
            f"lora.targets holds {dense[0]}, but {key} has experts in its place; use "
            "lora.targets=[linear_qkv,linear_proj]"
        )
    if fp8 != "none":
        raise InputError(
            f"teacher.quantization={fp8} is not built for experts, which {key} has; use "
            "teacher.quantization=none"
        )
