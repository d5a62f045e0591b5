"""Recorded responses in place of generated ones: which of a step's sequences, and as what."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.blocks import sequence_end
from megatron_opdlm.errors import InputError
from megatron_opdlm.prompts import PromptOrder, PromptSet
from megatron_opdlm.records import Prompt, Trajectory, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Prompts with a response each, and which of them would stand in for each sample of a step."""

    prompts: PromptSet
    order: PromptOrder
    samples_per_prompt: int

    def prompt(self, step: int, sample: int) -> Prompt:
        """The prompt whose response stands in for this sample."""
        place = self.order.batch(step)[sample // self.samples_per_prompt]
        return self.prompts.prompts[place]


def is_off_policy(samples: int, fraction: float, key: tuple[int, int]) -> list[bool]:
    """Which of a step's samples 0, 1, ... take a recorded response; ``key`` = (seed, step).

    Systematic sampling: sample i does where the count floor((i + 1) f + u) exceeds floor(i f + u),
    with one u ~ U[0, 1) a step. So every run of n neighbours, such as an update, has n f of them to
    within one, and the expected number is exactly that, however small f.
    """
    offset = float(randomness.uniform(*key, 0, 0, randomness.MIX))
    counts = [math.floor(i * fraction + offset) for i in range(samples + 1)]
    return [counts[i + 1] > counts[i] for i in range(samples)]


def recorded_trajectory(
    sample: int, prompt: Prompt, max_new_tokens: int, block_size: int, vocabulary: Vocabulary
) -> Trajectory:
    """A prompt's recorded response as a trajectory of whole blocks, as long as generation would go.

    It ends at its first end token, which is added where the response has none; the rest of that
    block is filled with the pad token, context without loss. What lies beyond the block of token
    ``max_new_tokens`` is cut off.
    """
    assert prompt.response_ids is not None
    tokens = list(prompt.response_ids)
    ends = [i for i, token in enumerate(tokens) if token in vocabulary.end_ids]
    tokens = tokens[: ends[0] + 1] if ends else tokens + list(vocabulary.end_ids[:1])
    before = len(prompt.ids)
    last = sequence_end(before, max_new_tokens, block_size) - before
    ended = len(tokens) <= last
    filled = sequence_end(before, len(tokens), block_size) - before
    return Trajectory(
        sample=sample,
        prompt=prompt,
        response_ids=(tokens + [vocabulary.pad_id] * (filled - len(tokens)))[:last],
        committed_at=[],
        response_tokens=min(len(tokens), max_new_tokens),
        finish_reason="stop" if ended else "length",
        forwards=0,
        passes=0,
        off_policy=True,
    )


def require_responses(prompts: Sequence[Prompt], where: str) -> None:
    """Raise InputError where a prompt has no response. ``where`` names the file's key."""
    missing = [prompt.index for prompt in prompts if prompt.response_ids is None]
    if missing:
        raise InputError(
            f"{where}: {len(missing)} of {len(prompts)} usable rows have no 'response', the first "
            f"of them row {missing[0]} counted from 0, and mixing.fraction takes them from there; "
            "add responses, name a file that has them with mixing.path, or use mixing.fraction=0"
        )
