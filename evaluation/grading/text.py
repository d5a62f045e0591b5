"""Exact match on text: take the answer out of a response, compare it with the accepted ones."""


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
