"""What passes between the stages of a step. One frozen record per hop.

Shape legend, used in names and comments everywhere:

    N  tokens of a packed row        S  slots (sequences being decoded)   W  window: new tokens of a
    slot in one forward P  prompt tokens                 R  response tokens (whole blocks)     B
    tokens per block M  masked positions that count   V  vocabulary                         H
    hidden size

``Trajectory`` keeps whole blocks; what a user sees is its first ``response_tokens`` tokens.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a prompts file."""

    index: int  # row number in the file, from 0; stable when neighbours are skipped
    ids: list[int]  # [P] rendered and tokenised
    domain: str | None = None
    response_ids: list[int] | None = None  # off-policy response from the file, if it has one
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # other keys of the row, carried into samples


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One generated response with the pass at which each of its tokens was committed."""

    sample: int  # key of its random numbers; unique within a step
    prompt: Prompt
    response_ids: list[int]  # [R] to the end of the last block: P + R is a multiple of B
    committed_at: list[int]  # [R] 1-based denoising pass within the token's block
    response_tokens: int  # tokens that a user gets: through the first end token, at most the limit
    finish_reason: str  # "stop" | "length"
    forwards: int  # model forward passes this sample took part in, prefill included
    passes: int  # denoising passes executed
    off_policy: bool = False  # recorded in a file: its tokens were committed by no pass

    @property
    def user_ids(self) -> list[int]:
        """The response as users get it."""
        return self.response_ids[: self.response_tokens]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token ids with a role. ``size`` is the Hugging Face config's ``vocab_size``: softmax runs
    over all of it.
    """

    size: int
    mask_id: int
    end_ids: tuple[int, ...]  # all of generation_config.eos_token_id
    pad_id: int
    forbidden_ids: tuple[
        int, ...
    ]  # never drawn: the mask token and ids that the tokenizer does not know
