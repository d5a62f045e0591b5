"""The block contract: blocks are counted from absolute position 0, block(i) = i // B.

Rollout, training, export and evaluation share these functions. The tokens of a prompt's unfinished
last block sit, clean and never masked, in the first generated block.

``shift`` other than 0 exists only to reproduce the public reference, whose training counts blocks
from the response's start although its rollout counts as we do: block(i) = (i + shift) // B.
"""

from itertools import pairwise


def block_shift(prompt_tokens: int, block_size: int, alignment: str) -> int:
    """What is added to a position before it is divided into blocks: 0 for ``absolute``; for
    ``response`` what makes the response start a block, and the prompt's blocks end there.
    """
    return -prompt_tokens % block_size if alignment == "response" else 0


def first_block_start(prompt_tokens: int, block_size: int) -> int:
    """Position where the first generated block starts; P - P mod B prompt tokens lie before it."""
    return prompt_tokens // block_size * block_size


def sequence_end(prompt_tokens: int, max_new_tokens: int, block_size: int) -> int:
    """Position after the whole block that holds the last allowed response token (DESIGN 4b, length
    limit).
    """
    return -(-(prompt_tokens + max_new_tokens) // block_size) * block_size


def block_lengths(
    prompt_tokens: int, response_tokens: int, block_size: int, shift: int = 0
) -> list[int]:
    """Response tokens in each generated block, in order. The first can be short (it shares its
    block with the prompt's tail), the last too (a recorded response that ends in mid-block)."""
    ends = range(
        first_block_start(prompt_tokens + shift, block_size) + block_size - shift,
        prompt_tokens + response_tokens,
        block_size,
    )
    edges = [prompt_tokens, *ends, prompt_tokens + response_tokens]
    return [right - left for left, right in pairwise(edges) if right > left]
