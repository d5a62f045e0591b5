"""Sections on what is learned from: prompts, generated responses, states."""

from dataclasses import dataclass
from typing import Literal

from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding, Remasking, Sampling
from megatron_opdlm.keys import key, key_of

Curve = Literal["linear", "sin", "cos"]
CurveOrConstant = Literal["linear", "sin", "cos", "constant"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training prompts (docs/data.md)."""

    path: str = key("", "JSON list, JSONL, Parquet, or a `datasets` directory", is_path=True)
    epochs: int = key(1, "passes over the prompts", unit="epochs", at_least=1, may_change=True)
    enable_thinking: bool = key(False, "thinking flag of the chat template")
    shuffle: bool = key(True, "every epoch in an order of its own; false: the file's")
    max_prompt_tokens: int | None = key(
        None,
        "longer prompts are skipped; null: what the model can hold",
        unit="tokens",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(EngineOptions, Sampling):
    """Generation of a step's responses by the student."""

    block_size: int = key_of(Decoding, "block_size", 4)
    denoising_steps: int = key_of(Decoding, "denoising_steps", 4)
    remasking: Remasking = key_of(Sampling, "remasking", "low_confidence_dynamic")
    temperature: float = key_of(Sampling, "temperature", 1.0)
    max_new_tokens: int = key_of(
        Sampling,
        "max_new_tokens",
        4000,
        help="length limit of a response; the curriculum never exceeds it",
    )
    max_new_tokens_by_domain: dict[str, int] = key(
        {}, "length limits by a row's domain", unit="tokens", at_least=1
    )
    prompts_per_step: int = key(128, "prompts of a step", unit="prompts", at_least=1)
    responses_per_prompt: int = key(
        1, "responses to each prompt of a step", unit="responses", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Response length over the first steps; `constant` is rollout.max_new_tokens from the start."""

    kind: CurveOrConstant = key("cos", "form of the ramp")
    start: int = key(100, "length where the ramp begins", unit="tokens", at_least=1)
    end: int = key(4000, "length after the ramp", unit="tokens", at_least=1)
    steps: int = key(100, "length of the ramp", unit="steps", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ThresholdScheduleConfig:
    """rollout.threshold over the run."""

    enabled: bool = key(False, "the schedule decides in place of rollout.threshold")
    kind: Curve = key("cos", "form of the ramp")
    start: float = key(0.9, "threshold before the ramp", unit="probability", at_least=0, at_most=1)
    end: float = key(0.7, "threshold after the ramp", unit="probability", at_least=0, at_most=1)
    hold_steps: int = key(150, "steps before the ramp", unit="steps", at_least=0)
    steps: int = key(
        -1, "length of the ramp", unit="steps", at_least=1, or_else=(-1, "to the end of the run")
    )


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """Which partially denoised states of a response are trained on."""

    mode: Literal["one_per_block", "all", "random_mask"] = key(
        "one_per_block", "one drawn state a block, every state, or masks drawn at random"
    )
    per_response: int = key(
        1,
        "states drawn of each response by one_per_block and random_mask; in a packed row they "
        "share its prompt and clean copy, and each counts as a sequence of an update",
        unit="states",
        at_least=1,
    )
    block_alignment: Literal["absolute", "response"] = key(
        "absolute",
        "where training counts blocks from; response: as the public reference trains, whose "
        "rollout counts from 0 all the same; for comparisons only (docs/recipes.md)",
    )


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Recorded responses in place of generated ones, at states of random masks; fraction 1 with
    loss.kind nll is supervised fine-tuning on the data's own responses (docs/losses.md).
    """

    fraction: float = key(0.0, "share of a step's sequences", at_least=0, at_most=1)
    kind: CurveOrConstant = key("constant", "form of the ramp; constant stays at fraction")
    end_fraction: float = key(0.0, "share after the ramp", at_least=0, at_most=1)
    steps: int = key(100, "length of the ramp", unit="steps", at_least=1)
    path: str = key(
        "", "file of prompts and their `response`; empty: those of data.path", is_path=True
    )
