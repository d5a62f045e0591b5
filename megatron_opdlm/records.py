"""What passes between the acts of a step, from ``train.py``: one frozen record per hop.

    Prompt -> rollout -> Rollout of Trajectories -> states -> States -> update -> UpdateReport

Packing and teacher stand between states and update. What they hand on is tensors on a device with
the attention that belongs to them, so their records stand beside them, where the model's imports
do: ``StepBatches`` of ``PackedBatch`` and ``FinishedBatch`` in packing/, ``Targets`` in
teacher.py. A ``Request`` to the engine and its slots' ``Windows`` are engine/slots.py's.

Shape legend, used in names and comments everywhere:

    B  tokens per block
    H  hidden size
    K  targets that the teacher keeps of a row
    M  masked positions that count
    N  tokens of a packed row
    P  prompt tokens
    R  response tokens (whole blocks)
    S  slots (sequences being decoded)
    U  targets that a rank computes of a row
    V  vocabulary
    W  window: new tokens of a slot in one forward
    n  tokens of a packed row that a context rank has

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
    # [R] probability of each token when it was committed, to a millionth; empty: recorded
    # elsewhere. Rounding of logits differs with the batch, so it is not compared.
    confidence: list[float] = field(default_factory=list, compare=False)
    # [R] the best logit at each token's position less the second best, in the pass that committed
    # it; empty: not recorded (``Decoding.margins``).
    margins: list[float] = field(default_factory=list, compare=False)
    off_policy: bool = False  # recorded in a file: its tokens were committed by no pass

    @property
    def user_ids(self) -> list[int]:
        """The response as users get it."""
        return self.response_ids[: self.response_tokens]


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one finished block adds to a response, as users get it: nothing of the prompt, and
    nothing after the first end token or the limit. It can be empty.
    """

    sample: int  # of its request
    ids: list[int]  # [at most B]
    committed_at: list[int]  # as long: 1-based denoising pass of each token


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What generating requests made and what it cost."""

    trajectories: list[Trajectory]
    flops: float  # of all ranks of the copies of the model that generated
    slots: int = 0  # sequences that fit at once
    slot_utilisation: float = 0.0  # share of slots that worked, averaged over forwards
    complete: bool = True  # False: it was told to stop, and has not all trajectories


@dataclass(frozen=True, kw_only=True)
class State:
    """One sequence with the noisy input that the student is trained on."""

    sample: int
    prompt_ids: list[int]
    response_ids: list[int]  # [R]
    masked: list[bool]  # [R] True where the noisy copy holds the mask token
    counted: list[bool]  # [R] masked and under loss (DESIGN 4b, Loss)
    trained_tokens: int  # response tokens through the first end token, masked or not
    off_policy: bool = False  # the response was recorded, not generated


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update, the same on every rank of a replica, its context ranks included; sums are over
    its sequences only.
    """

    sequence_loss: list[float]  # in the order of the microbatches' states
    share_sum: dict[float, float]  # masked share of the block -> sum of the positions' values, nats
    share_count: dict[float, int]
    place_sum: dict[int, float]  # the same by the token's place in its block (PackedBatch.place)
    place_count: dict[int, int]
    position_value: list[float]  # of the microbatches' counted positions, this context rank's alone
    grad_norm: float  # L2 norm over all parameters before clipping


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """What an update saw of one token of a response that people are shown."""

    sample: int
    position: int  # in the response
    masked: int  # tokens of the response that its state has masked
    value: float  # the loss's divergence there, nats
    teacher: list[tuple[int, float]]  # its likeliest tokens with their probabilities; may be empty


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
