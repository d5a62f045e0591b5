"""Requests for the tiny models, and what their ids mean."""

import torch

from megatron_opdlm.records import Prompt, Vocabulary
from megatron_opdlm.rollout import Request
from tests.conftest import LAST_TOKEN, MASK, VOCABULARY

FORBIDDEN = tuple(range(LAST_TOKEN + 1, VOCABULARY))
# Two end tokens that random models do produce, one of them an everyday character.
IDS = Vocabulary(
    size=VOCABULARY, mask_id=MASK, end_ids=(48, 21), pad_id=46, forbidden_ids=FORBIDDEN
)


def request(sample: int, prompt_tokens: int, limit: int) -> Request:
    """A random prompt. End tokens occur in it, too: chats are full of them."""
    generator = torch.Generator().manual_seed(100 * prompt_tokens + sample)
    ids = torch.randint(LAST_TOKEN + 1, (prompt_tokens,), generator=generator).tolist()
    return Request(sample=sample, prompt=Prompt(index=sample, ids=ids), max_new_tokens=limit)
