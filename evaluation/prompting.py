"""From a row that asks something to token ids, as ``megatron_opdlm.prompts`` renders them, and from
a response back to text.
"""

from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.prompts import render
from megatron_opdlm.records import Prompt, Trajectory

_ASKS_BY: dict[str, type] = {"prompt_ids": list, "prompt": str, "messages": list, "question": str}


def problem_of(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of prompts, as ``rule; remedy``; None when it is fine.

    Needs no tokenizer.
    """
    given = [key for key in _ASKS_BY if key in row]
    if len(given) != 1:
        return f"needs exactly one of {', '.join(_ASKS_BY)}, has {' and '.join(given) or 'none'}"
    key = given[0]
    if not isinstance(row[key], _ASKS_BY[key]) or not row[key]:
        return f"{key!r} must be a {_ASKS_BY[key].__name__} that is not empty"
    if key == "prompt_ids" and not all(type(i) is int and i >= 0 for i in row[key]):
        return "'prompt_ids' must hold token ids (whole numbers from 0)"
    return None


def prompt_from(
    index: int,
    row: dict[str, Any],
    tokenizer: Any,
    *,
    where: str,
    enable_thinking: bool = False,
) -> Prompt:
    """Tokenise one row. InputError: ``where`` (a flag or a task), row and rule."""
    if tokenizer is None and "prompt_ids" not in row:
        raise InputError(f"{where}: row {index}: the model has no tokenizer; give prompt_ids")
    try:
        ids = _ids(row, tokenizer, enable_thinking)
    except InputError as error:
        raise InputError(f"{where}: row {index}: {error}") from error
    if not ids:
        raise InputError(f"{where}: row {index}: the prompt has no tokens; write some text")
    return Prompt(index=index, ids=ids)


def _ids(row: dict[str, Any], tokenizer: Any, enable_thinking: bool) -> list[int]:
    """Token ids of a row. Messages that end with an assistant's turn are continued inside it,
    without thinking: the template opens that turn, and its text follows as it stands.
    """
    messages = row.get("messages")
    if not messages or messages[-1].get("role") != "assistant":
        return render(row, tokenizer, enable_thinking)
    opened = render({"messages": messages[:-1]}, tokenizer, False)
    return [*opened, *tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]]


def response_text(tokenizer: Any, trajectory: Trajectory) -> str:
    """The response as text, without special tokens; empty for a model without a tokenizer."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(trajectory.user_ids, skip_special_tokens=True)
