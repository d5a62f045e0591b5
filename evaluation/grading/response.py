"""What of a response is graded: no control tokens, no thinking.

A reader sees text up to the first end token; Qwen3's thinking stands between ``<think>`` and
``</think>`` before the answer.
"""

import re
from collections.abc import Iterator

# Qwen3's control tokens as they look when an engine leaves them in its text. The first end token
# ends the response.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_CONTROL_TOKENS = re.compile(r"<\|(?:im_start|im_end|endoftext|MASK|mask)\|>")

_OPEN, _CLOSE = "<think>", "</think>"


def without_control_tokens(text: str) -> str:
    """The response up to the first end token, without control tokens: what a reader would see.

    >>> without_control_tokens("12<|im_end|><|endoftext|>")
    '12'
    """
    ends = [text.index(token) for token in _END_TOKENS if token in text]
    return _CONTROL_TOKENS.sub("", text[: min(ends)] if ends else text)


def without_thinking(text: str) -> str | None:
    """The answer outside the thinking blocks; None when a block never ends: there is no answer.

    A ``</think>`` without its opening ends a block that the prompt opened. A text without blocks
    comes back as it is; else the white space around the answer goes with them.

    >>> without_thinking("<think>7?</think>\\n\\n8")
    '8'
    """
    answer = "".join(_outside_blocks(text))
    if _OPEN in answer.rpartition(_CLOSE)[2]:
        return None
    answer = answer.rpartition(_CLOSE)[2]
    return answer if answer == text else answer.strip()


def _outside_blocks(text: str) -> Iterator[str]:
    """What stands before, between and after the closed blocks."""
    place = 0
    while (start := text.find(_OPEN, place)) >= 0:
        end = text.find(_CLOSE, start)
        if end < 0:
            break
        yield text[place:start]
        place = end + len(_CLOSE)
    yield text[place:]
