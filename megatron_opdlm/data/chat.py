"""Chats as the files of other trainers hold them (TRL, verl, chat services) -> ``messages``.

A list of messages stands under ``messages`` or ``prompt``, as it is or as its JSON text; the
content of a message is text or a list of text parts.
"""

from collections.abc import Mapping
from typing import Any

from megatron_opdlm.data.json_text import parse
from megatron_opdlm.errors import InputError

_OTHER_SOURCES = ("question", "prompt_ids")  # beside one of them a prompt is only carried along


def with_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its chat as a list ``messages`` of {role, content, ...}, contents as text; a row
    without a chat as it is. InputError: what is wrong with the chat, and the remedy.
    """
    if "messages" in row:
        return {**row, "messages": _checked(_parsed(row["messages"]))}
    if "prompt" not in row or any(key in row for key in _OTHER_SOURCES):
        return dict(row)
    chat = _parsed(row["prompt"])
    if isinstance(row["prompt"], str) and not _is_chat(chat):
        return dict(row)
    if not isinstance(chat, list):
        return dict(row)
    if chat and all(isinstance(item, int | float) for item in chat):
        raise InputError("prompt is a list of numbers; token ids go under prompt_ids")
    others = {key: value for key, value in row.items() if key != "prompt"}
    return {"messages": _checked(chat), **others}


def _parsed(value: Any) -> Any:
    """What a JSON text of a list says; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse(value)
    except ValueError:
        return value


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value)
    )


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InputError(
            "messages must be a list of at least one {role, content}, or its JSON text"
        )
    return [_message(number, message) for number, message in enumerate(messages, start=1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message without the keys that have no value: Parquet fills them in."""
    fields = message if isinstance(message, dict) else {}
    fields = {key: value for key, value in fields.items() if value is not None}
    if isinstance(fields.get("content"), list):
        fields["content"] = "".join(_text(number, part) for part in fields["content"])
    if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
        rename = {"from", "value"} <= fields.keys()
        remedy = "; rename from to role and value to content" if rename else "; write them"
        raise InputError(f"message {number} must have role and content, both text{remedy}")
    if fields["role"] == "user" and not fields["content"].strip():
        raise InputError(f"message {number}, of the user, is empty; write what is asked")
    return fields


def _text(number: int, part: Any) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, dict) else {}
    kind, text = fields.get("type", "text"), fields.get("text")
    if kind != "text" or not isinstance(text, str):
        shown = f"of type {str(kind)[:40]!r}" if kind != "text" else "without text"
        raise InputError(
            f"message {number} has a part {shown}; leave out rows that hold more than text"
        )
    return text
