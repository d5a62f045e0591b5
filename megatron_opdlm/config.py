"""The configuration of a run: a typed, frozen tree. Defaults < YAML file < dotted overrides.

A key that does not exist, a value of the wrong type, a value outside its range and a value that is
not built yet are all an ``InputError`` of one line. Imports no torch: a bad configuration fails
before anything slow is loaded.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_opdlm.configuration import rules
from megatron_opdlm.configuration.tree import build, flatten
from megatron_opdlm.configuration.values import first_line, read_file, read_override
from megatron_opdlm.errors import InputError

Precision = Literal["auto", "fp32", "bf16"]
Curve = Literal["linear", "sin", "cos"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student, and the layout that student and teacher share."""

    path: str = ""  # Hugging Face directory or Megatron checkpoint to start from
    mask_token_id: int | None = None  # null: the tokenizer's mask token, else 151669 where it fits
    tensor_parallel: int = 1  # ranks
    pipeline_parallel: int = 1  # ranks
    # Ranks that share every packed row: its tokens, and during attention its heads, so it divides
    # the heads of a tensor rank. For rows too long for one rank's memory; they generate like
    # replicas.
    context_parallel: int = 1
    # Ranks that share out the experts of a mixture, among those of data and context parallelism
    # (docs/parallelism.md); divides their number and that of the experts.
    expert_parallel: int = 1
    sequence_parallel: bool = False
    dtype: Precision = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    max_positions: int | None = None  # tokens; null: the model's own limit
    # Layers: te = Transformer Engine's (fused norms), local = Megatron's own. auto: te where it is
    # installed, on GPUs in 16 bits. Checkpoints are the same.
    spec: Literal["auto", "local", "te"] = "auto"
    recompute: bool = False  # recompute activations in the backward pass: less memory, more time


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    path: str = ""  # empty: the same weights as the student's start
    dtype: Precision = "auto"
    # fp8: the layers' linears get E4M3 weights and activations (docs/teacher.md), with scales taken
    # on this many first prompts of data.path
    quantization: Literal["none", "fp8"] = "none"
    calibration_prompts: int = 64
    temperature: float = 1.0  # divides the teacher's logits: above 1 a flatter target
    top_p: float = 1.0  # below 1: the target is the nucleus of this probability, renormalised
    # What is kept of its answer at a position: its final hidden state, or the loss.top_k largest
    # entries of its distribution (docs/teacher.md)
    targets: Literal["hidden", "top_k"] = "hidden"
    offload_targets: bool = False  # keep them in host memory between the phases
    offload_weights: bool = False  # the layers wait in host memory while the teacher is not asked


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank terms (alpha / rank) B A beside frozen weights (docs/lora.md)."""

    rank: int = 0  # features between A and B; 0: all weights are trained
    alpha: float = 16.0
    targets: list[str] = field(  # of Megatron's linears
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    share_teacher: bool = True  # the frozen base is the teacher where teacher.path is model.path


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Who computes attention of packed rows (docs/attention.md); decoding has its own."""

    # auto: dense on a CPU; on GPUs flex, for the teacher te where it is installed
    backend: Literal["auto", "dense", "flex", "te"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # JSON list, JSONL, Parquet, or a `datasets` directory
    epochs: int = 1
    enable_thinking: bool = False  # thinking flag of the chat template
    shuffle: bool = True
    max_prompt_tokens: int | None = (
        None  # longer prompts are skipped; null: what the model can hold
    )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    block_size: int = 4  # tokens
    denoising_steps: int = 4  # passes in which a block is finished at the latest
    remasking: Literal[
        "low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"
    ] = "low_confidence_dynamic"
    threshold: float = 0.9  # probability, for low_confidence_dynamic
    entropy_bound: float = 0.35  # nats, for entropy_bounded
    temperature: float = 1.0  # 0: arg-max
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    prompts_per_step: int = 128
    responses_per_prompt: int = 1
    max_new_tokens: int = 4000  # response tokens; the curriculum never exceeds it
    max_new_tokens_by_domain: dict[str, int] = field(default_factory=dict)  # caps by a row's domain
    slots: int = 128  # sequences decoded at once on a data-parallel rank
    kv_cache_tokens: int | None = None  # cached positions of all slots; null: half the free memory
    prefill_tokens: int = 8192  # of prompts that join one forward; a longer prompt joins alone
    # auto: rows on GPUs that have flash-attn, else buckets (engine/decode_forward.py)
    attention: Literal["auto", "buckets", "rows"] = "auto"
    graphs: bool = True  # replay forwards captured in CUDA graphs, with rows on GPUs


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Response length over the first steps; `constant` is rollout.max_new_tokens from the start."""

    kind: Literal["linear", "sin", "cos", "constant"] = "cos"
    start: int = 100  # tokens
    end: int = 4000  # tokens
    steps: int = 100  # steps of the ramp


@dataclass(frozen=True, kw_only=True)
class ThresholdScheduleConfig:
    enabled: bool = False
    kind: Curve = "cos"
    start: float = 0.9
    end: float = 0.7
    hold_steps: int = 150  # steps at `start` before the ramp
    steps: int = -1  # steps of the ramp; -1: to the end of the run


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    mode: Literal["one_per_block", "all", "random_mask"] = "one_per_block"
    # Where training counts blocks from. response: as the public reference trains, whose rollout
    # counts from 0 all the same; for comparisons only (docs/recipes.md).
    block_alignment: Literal["absolute", "response"] = "absolute"


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Recorded responses in place of generated ones, at states of random masks.

    fraction 1 with loss.kind nll is supervised fine-tuning on the data's own responses.
    """

    fraction: float = 0.0  # share of a step's sequences
    kind: Literal["linear", "sin", "cos", "constant"] = "constant"
    end_fraction: float = 0.0  # after `steps`; `constant` stays at `fraction`
    steps: int = 100  # steps of the ramp
    path: str = ""  # file with prompts and their `response`; empty: those of data.path


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    kind: Literal["forward_kl", "reverse_kl", "mixed", "jsd", "nll"] = "forward_kl"
    reverse_weight: float = 0.0  # weight of the reverse KL in `mixed`
    jsd_alpha: float = 0.5
    top_k: int = 0  # the loss sums over the teacher's k largest entries; 0: the full vocabulary
    # The other entries: dropped from the sum (the reference), both distributions renormalised over
    # the k entries, or gathered in one bucket that counts as an entry of its own.
    top_k_tail: Literal["drop", "renormalise", "bucket"] = "drop"
    exclude_eos: bool = False
    logit_shift: bool = False  # read the token at position i from logits i-1
    chunk_rows: int = 0  # masked positions projected at once; 0: what suits the hardware


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    tokens_per_microbatch: int = 4096  # packed tokens: prompt + clean + noisy


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a cosine learning rate that advances per update."""

    lr: float = 1e-5
    min_lr: float = 1e-6
    warmup_steps: int = 5  # steps, not updates
    batch_size: int = 8  # sequences per update
    clip_grad: float = 1.0  # L2 norm; 0: no clipping
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    # What Transformer Engine's Adam can keep in 16 bits, beside 16-bit weights on a GPU.
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    exp_avg_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    cpu_offload: bool = False  # the state waits in host memory during rollout and teacher phase


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = -1  # -1: all epochs of the data
    # Steps over which learning rate and threshold_schedule run; null: train.steps. A run that is
    # extended says here whether they keep their curves (docs/checkpoints.md).
    schedule_steps: int | None = None
    inner_epochs: int = 1  # passes over the sequences of one rollout
    seed: int = 10086
    out: str = ""  # run directory; the same command resumes it


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 10  # steps
    keep: int = 2  # newest checkpoints kept
    async_save: bool = True  # write from copies in host memory while the run goes on


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Tasks that the student is asked while it trains, in blocks of ``rollout.block_size``, with
    ``data.enable_thinking`` (docs/evaluation.md).
    """

    every: int = 0  # steps; 0: never. Else also before step 1 and after the last step
    tasks: list[str] = field(default_factory=list)
    data: str = ""  # directory of the tasks' data files
    limit: int | None = None  # first problems of each task; None: all
    responses_per_prompt: int = 1
    max_new_tokens: int = 2000  # response tokens
    denoising_steps: int | None = None  # passes per block; None: rollout.denoising_steps
    remasking: Literal[
        "low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"
    ] = "low_confidence_static"
    threshold: float = 0.9  # probability; low_confidence_dynamic
    entropy_bound: float = 0.35  # nats; entropy_bounded
    temperature: float = 0.0  # 0: arg-max
    top_p: float = 1.0  # probability mass kept
    top_k: int = 0  # tokens kept; 0: all
    seed: int = 0
    keep_best: bool = True  # the best evaluated step has a checkpoint that is never removed
    best_by: str = ""  # task whose accuracy decides; "": the mean over the tasks


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """What a job does about ranks that die or hang (docs/failures.md)."""

    timeout_seconds: int = 600  # without a sign of life, or without progress, until all ranks end


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    samples_every: int = 10  # steps
    samples: int = 2  # sample texts each time
    tensorboard: bool = True
    wandb: Literal["none", "offline", "online"] = "none"  # Weights & Biases
    wandb_project: str = "megatron-opdlm"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    threshold_schedule: ThresholdScheduleConfig = field(default_factory=ThresholdScheduleConfig)
    states: StatesConfig = field(default_factory=StatesConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def load_config(file: Path | None, overrides: list[str]) -> Config:
    """Defaults, then ``file``, then ``overrides`` (``section.key=VALUE``, VALUE in YAML); checked.

    A value may refer to another key: ``${model.path}``.
    """
    trees = [read_file(file)] if file is not None else []
    trees += [read_override(text) for text in overrides]
    defaults = dataclasses.asdict(Config())
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(defaults, *trees), resolve=True)
    except TypeError as error:  # of OmegaConf's: the types that it cannot merge
        raise InputError(
            "configuration: a list stands where a section is needed; write section: {key: value}"
        ) from error
    except OmegaConfBaseException as error:
        raise InputError(f"configuration: {first_line(error)}") from error
    assert isinstance(merged, dict)
    config = build(Config, merged)
    rules.check(flatten(config))
    return config


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
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def differing_keys(a: Config, b: Config) -> list[str]:
    """Dotted keys whose values differ, in the order of the tree."""
    values_a, values_b = flatten(a), flatten(b)
    return [key for key, value in values_a.items() if value != values_b[key]]
