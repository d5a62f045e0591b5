"""Data file -> prompts, and the order in which training visits them.

A row has ``messages`` (in the forms of data/chat.py), or ``question`` (with optional ``system``),
or ``prompt_ids``, or a plain ``prompt`` text; ``domain`` and ``response`` are optional; other keys
are carried along. The order is a pure function of (seed, epoch), so a resumed run needs nothing but
its step.
"""

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.data.chat import with_messages
from megatron_opdlm.data.rows import Row, read_rows
from megatron_opdlm.errors import InputError
from megatron_opdlm.records import Prompt

SOURCES = ("messages", "question", "prompt_ids", "prompt")


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The usable prompts of a file, and how many were left out for their length."""

    prompts: list[Prompt]
    skipped: int  # prompts with more tokens than the limit

    @property
    def summary(self) -> str:
        """How many there are, for people."""
        return f"{len(self.prompts)} usable, {self.skipped} skipped for their length"


def load_prompts(
    path: Path | str,
    tokenizer: Any,
    *,
    enable_thinking: bool,
    max_prompt_tokens: int | None,
    vocab_size: int,
    option: str = "data.path",
) -> PromptSet:
    """Read, render and check every row of a file; ``option`` is the key that named it.

    Prompts longer than ``max_prompt_tokens`` (null: no limit) are skipped and counted; the others
    keep their row number as ``index``. A malformed row is an ``InputError`` with path and line.
    """
    rows = read_rows(Path(path), option)
    prompts = [_prompt(row, tokenizer, enable_thinking, vocab_size) for row in rows]
    kept = [p for p in prompts if max_prompt_tokens is None or len(p.ids) <= max_prompt_tokens]
    if not kept:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise InputError(
            f"{option}={path}: all {len(prompts)} prompts are longer than the limit of "
            f"{max_prompt_tokens} tokens (the shortest has {shortest}); use shorter prompts or "
            "raise data.max_prompt_tokens"
        )
    return PromptSet(prompts=kept, skipped=len(prompts) - len(kept))


def render(row: Mapping[str, Any], tokenizer: Any, enable_thinking: bool) -> list[int]:
    """Token ids [P] of one row. The errors say what is wrong with the row, not where it stands."""
    asked = what_is_asked(row)
    if isinstance(asked, str):
        return _encode(tokenizer, asked, "prompt")
    if not isinstance(asked, Chat):
        return asked
    if asked.messages[-1]["role"] == "assistant":
        raise InputError(
            "messages end with the assistant's; end with the user's, answer in 'response'"
        )
    _require_tokenizer(tokenizer, asked.source)
    return _encode(tokenizer, _chat_text(asked.messages, tokenizer, enable_thinking), asked.source)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What goes into the chat template, and the key of the row that held it."""

    messages: list[dict[str, Any]]  # {role, content, ...}, both text
    source: str


def what_is_asked(row: Mapping[str, Any]) -> list[int] | str | Chat:
    """Token ids, a plain text or a chat: what the row asks by, checked as far as that goes without
    a tokenizer. The errors say what is wrong with the row, not where it stands.
    """
    row = with_messages(row)
    source = _source(row)
    if source == "prompt_ids":
        return _checked_ids(row["prompt_ids"])
    if source == "prompt":
        return _text(row, "prompt")
    if source == "messages":
        return Chat(messages=row["messages"], source=source)
    system, question = _optional_text(row, "system"), _text(row, "question")
    if not question.strip():
        raise InputError("question is empty; write what is asked, or leave the row out")
    before = [] if system is None else [{"role": "system", "content": system}]
    return Chat(messages=[*before, {"role": "user", "content": question}], source=source)


def check_vocabulary(ids: list[int], vocab_size: int) -> None:
    """Every id is a row of the model's embedding."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is not in the model's vocabulary; ids are 0 to {vocab_size - 1}"
            )


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts each step takes; steps are counted from 1, prompts are positions 0 to n-1.

    One shuffled pass per epoch, the passes joined end to end and cut into chunks: where an epoch's
    last chunk is short, it is filled from the start of the next epoch.
    """

    n: int
    prompts_per_step: int
    epochs: int
    seed: int
    shuffle: bool

    @property
    def total_steps(self) -> int:
        return math.ceil(self.n / self.prompts_per_step) * self.epochs

    def batch(self, step: int) -> list[int]:
        """Positions of the prompts of one step. No state: any step can be asked for at any time."""
        first = (step - 1) * self.prompts_per_step
        visits = (divmod(visit, self.n) for visit in range(first, first + self.prompts_per_step))
        return [
            _epoch_order(self.n, self.seed, epoch)[place] if self.shuffle else place
            for epoch, place in visits
        ]


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Positions 0 to n-1 in the order of one epoch, counted from 0."""
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def _prompt(row: Row, tokenizer: Any, enable_thinking: bool, vocab_size: int) -> Prompt:
    try:
        fields = with_messages(row.fields)
        used = {_source(fields), "system", "domain", "response"}
        ids = render(fields, tokenizer, enable_thinking)
        if not ids:
            raise InputError("the prompt is empty; training needs at least one token of context")
        check_vocabulary(ids, vocab_size)
        response = _optional_text(fields, "response")
        response_ids = None if response is None else _encode(tokenizer, response, "response")
        check_vocabulary(response_ids or [], vocab_size)
        return Prompt(
            index=row.index,
            ids=ids,
            domain=_optional_text(fields, "domain"),
            response_ids=response_ids,
            extra={key: value for key, value in fields.items() if key not in used},
        )
    except InputError as error:
        raise InputError(f"{row.place}: {error}") from error


def _source(row: Mapping[str, Any]) -> str:
    """Which key holds the prompt; beside one of the others, ``prompt`` is only carried along."""
    present = [key for key in SOURCES if key in row]
    if not present:
        keys = ", ".join(map(str, row)) or "nothing"
        raise InputError(
            f"a row needs messages, question or prompt_ids; this one has {keys}; rename "
            "the key that asks"
        )
    if len(present) > 1 and present[1] != "prompt":
        raise InputError(f"a row has {' or '.join(present)}, not both; remove one")
    if "system" in row and present[0] != "question":
        raise InputError(f"'system' goes with 'question', not with {present[0]!r}; put it there")
    return present[0]


def _chat_text(messages: list[dict[str, Any]], tokenizer: Any, enable_thinking: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template to render messages or a question with; "
            "give prompt_ids, or add a chat_template.jinja to the model's directory"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception as error:  # a template is a program of its author's: it raises what it likes
        raise InputError(
            f"the chat template refuses these messages: {error}; change them or the template"
        ) from error


def _require_tokenizer(tokenizer: Any, key: str) -> None:
    if tokenizer is None:
        instead = "remove it" if key == "response" else "give prompt_ids in its place"
        raise InputError(
            f"the model has no tokenizer to read {key!r} with; add its files to the model's "
            f"directory, or {instead}"
        )


def _encode(tokenizer: Any, text: str, key: str) -> list[int]:
    """Ids of the text of ``key`` as it stands: templates bring their own special tokens."""
    _require_tokenizer(tokenizer, key)
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except (
        Exception
    ) as error:  # a bare one, where a character is unknown and no token stands for it
        raise InputError(
            f"the model's tokenizer cannot read {key!r} ({error}); use characters that it knows"
        ) from error


def _checked_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list) or any(type(token) is not int or token < 0 for token in ids):
        raise InputError("prompt_ids must be a list of token ids, integers from 0")
    return ids


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key} must be text, not {type(value).__name__}")
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str | None:
    return _text(row, key) if key in row else None
