"""Exact match on text: take the answer out of a response, compare it with the accepted ones."""

import re

# Qwen3's control tokens as they look when an engine leaves them in its text. The first end token
# ends the response.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_CONTROL_TOKENS = re.compile(r"<\|(?:im_start|im_end|endoftext|MASK|mask)\|>")


def without_control_tokens(text: str) -> str:
    """The response up to the first end token, without control tokens: what a reader would see.

    >>> without_control_tokens("12<|im_end|><|endoftext|>")
    '12'
    """
    ends = [text.index(token) for token in _END_TOKENS if token in text]
    return _CONTROL_TOKENS.sub("", text[: min(ends)] if ends else text)


def after_last(text: str, marker: str) -> str | None:
    """What follows the last ``marker`` on its line, stripped; None when there is nothing.

    >>> after_last("so #### 72 apples\\nbye", "####")
    '72 apples'
    """
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    first_line = rest.lstrip().split("\n", 1)[0].strip()
    return first_line or None


def is_one_of(extracted: str | None, accepted: list[str]) -> bool:
    """Whether the text equals an accepted string; outer spaces do not count, all else does."""
    return extracted is not None and extracted.strip() in {answer.strip() for answer in accepted}
