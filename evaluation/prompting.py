"""From a row that asks something to token ids, as ``megatron_opdlm.prompts`` renders them, and from
a response back to text.
"""

from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.prompts import Chat, render, what_is_asked
from megatron_opdlm.records import Prompt, Trajectory


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
    asked = what_is_asked(row)
    if not isinstance(asked, Chat) or asked.messages[-1]["role"] != "assistant":
        return render(row, tokenizer, enable_thinking)
    *before, last = asked.messages
    opened = render({"messages": before}, tokenizer, False)
    return [*opened, *tokenizer(last["content"], add_special_tokens=False)["input_ids"]]


def response_text(tokenizer: Any, trajectory: Trajectory) -> str:
    """The response as text, without special tokens; empty for a model without a tokenizer."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(trajectory.user_ids, skip_special_tokens=True)
