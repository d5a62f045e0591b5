"""Sections on learning and what is kept of it: loss, optimizer, run, checkpoints, evaluation."""

from dataclasses import dataclass
from typing import Literal

from megatron_opdlm.diffusion.decoding import Decoding, Sampling
from megatron_opdlm.keys import key, key_of


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Divergence of the student from the teacher at the masked positions (docs/losses.md)."""

    kind: Literal["forward_kl", "reverse_kl", "mixed", "jsd", "nll"] = key(
        "forward_kl", "kind of divergence; nll: of recorded responses, asks no teacher"
    )
    reverse_weight: float = key(0.0, "weight of the reverse KL in `mixed`", at_least=0, at_most=1)
    jsd_alpha: float = key(0.5, "weight of the teacher in `jsd`", at_least=0, at_most=1)
    top_k: int = key(
        0,
        "number of the teacher's largest entries that the loss sums over; 0: the full vocabulary",
        unit="entries",
        at_least=0,
    )
    top_k_tail: Literal["drop", "renormalise", "bucket"] = key(
        "drop",
        "the other entries: dropped from the sum (the reference), both distributions "
        "renormalised over the k entries, or gathered in a bucket that counts as one entry",
    )
    exclude_eos: bool = key(False, "the end token itself is not trained")
    logit_shift: bool = key(False, "read the token at position i from logits i-1")
    chunk_rows: int = key(
        0,
        "masked positions projected at once; 0: what suits the hardware",
        unit="positions",
        at_least=0,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Packing of an update."""

    tokens_per_microbatch: int = key(
        0,
        "length of packed rows: prompt + clean + noisy; 0: what suits the hardware",
        unit="tokens",
        at_least=0,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a cosine learning rate that advances per update. The dtypes are what Transformer
    Engine's Adam can keep in 16 bits, beside 16-bit weights on a GPU.
    """

    lr: float = key(1e-5, "highest learning rate", above=0)
    min_lr: float = key(1e-6, "last learning rate", at_least=0)
    warmup_steps: int = key(5, "length of the linear ramp from 0", unit="steps", at_least=0)
    batch_size: int = key(8, "sequences of an update", unit="sequences", at_least=1)
    clip_grad: float = key(
        1.0, "largest norm of the gradient; 0: no clipping", unit="L2 norm", at_least=0
    )
    beta1: float = key(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = key(0.999, "decay of the second moment", at_least=0, below=1)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = key(0.0, "decoupled weight decay", at_least=0)
    main_params_dtype: Literal["fp32", "fp16"] = key("fp32", "type of the master weights")
    exp_avg_dtype: Literal["fp32", "bf16", "fp16"] = key("fp32", "type of the first moment")
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16"] = key("fp32", "type of the second moment")
    cpu_offload: bool = key(
        False, "the state waits in host memory until the update", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and place of the run."""

    steps: int = key(
        -1,
        "length of the plan, which learning rate and threshold_schedule run over; the run ends "
        "with it unless train.stop_after says otherwise",
        unit="steps",
        at_least=1,
        or_else=(-1, "all epochs of the data"),
        may_change=True,
    )
    stop_after: int | None = key(
        None,
        "last step of the run, whatever the plan's, whose curves stay as they are; later than that "
        "in a run that is there already (docs/checkpoints.md); null: the plan's",
        unit="steps",
        at_least=1,
        may_change=True,
    )
    inner_epochs: int = key(
        1, "passes over the sequences of one rollout", unit="passes", at_least=1
    )
    seed: int = key(10086, "seed of every random draw", at_least=0)
    out: str = key("", "run directory; the same command resumes it", is_path=True, may_change=True)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of the run (docs/checkpoints.md)."""

    every: int = key(10, "steps between two checkpoints", unit="steps", at_least=1)
    keep: int = key(2, "newest checkpoints that are kept", unit="checkpoints", at_least=1)
    async_save: bool = key(True, "write from copies in host memory while the run goes on")
    export: list[str] = key(
        [],
        "formats of `opdlm export`, such as [sdar]: each checkpoint that is kept is exported to "
        "exports/FORMAT/ of the run directory by a process beside the run",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Sampling):
    """Tasks that the student is asked while it trains, in blocks of ``rollout.block_size``, with
    ``data.enable_thinking`` (docs/evaluation.md).
    """

    every: int = key(
        0,
        "steps between two evaluations, also before step 1 and after the last; 0: never",
        unit="steps",
        at_least=0,
    )
    tasks: list[str] = key([], "names of tasks")
    data: str = key("", "directory of the tasks' data files", is_path=True)
    limit: int | None = key(
        None, "first problems of each task; null: all", unit="problems", at_least=1
    )
    responses_per_prompt: int = key(1, "responses to each problem", unit="responses", at_least=1)
    max_new_tokens: int = key_of(Sampling, "max_new_tokens", 2000)
    denoising_steps: int | None = key_of(
        Decoding, "denoising_steps", None, help="passes of a block; null: rollout.denoising_steps"
    )
    seed: int = key_of(Decoding, "seed", 0)
    keep_best: bool = key(True, "the best evaluated step has a checkpoint that is never removed")
    best_by: str = key("", "task whose accuracy decides; empty: the mean over the tasks")
    sandbox: Literal["required", "best-effort"] = key(
        "required",
        "where the kernel cannot confine generated programs: run none, or with what it grants "
        "(docs/sandbox.md)",
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """What a job does about ranks that die or hang (docs/failures.md)."""

    timeout_seconds: int = key(
        600,
        "time without a sign of life, or without progress, until all ranks end",
        unit="seconds",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run tells (docs/metrics.md)."""

    samples_every: int = key(10, "steps between sample texts", unit="steps", at_least=1)
    samples: int = key(2, "sample texts each time", unit="texts", at_least=0)
    tensorboard: bool = key(True, "write TensorBoard's files")
    wandb: Literal["none", "offline", "online"] = key("none", "Weights & Biases")
    wandb_project: str = key("megatron-opdlm", "project of the run's page")
    wandb_entity: str = key("", "user or team of the project; empty: the account's default")
    wandb_group: str = key("", "group of runs that the page shows together")
    wandb_name: str = key("", "name of the run; empty: the run directory's")
    wandb_tags: list[str] = key([], "tags of the run")
    trackers: list[str] = key([], "modules of other trackers (docs/metrics.md)")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A profile of a few steps (docs/profiling.md)."""

    steps: list[int] = key(
        [], "first and last step that are profiled; empty: none", unit="steps", at_least=1
    )
    ranks: list[int] = key([0], "global ranks that are profiled", at_least=0)
    kind: Literal["torch", "nsys", "memory"] = key(
        "torch",
        "torch: operators and kernels in time; nsys: a capture for NVIDIA Nsight Systems; memory: "
        "allocations",
    )
