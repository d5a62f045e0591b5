"""Trajectories as rows that people read: texts beside ids, and when each token was committed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.records import TokenView, Trajectory

# Sample -> position in its response -> what the update saw of the token.
Views = Mapping[int, Mapping[int, TokenView]]


def sample_rows(
    trajectories: Sequence[Trajectory], model_files: Path, views: Views
) -> list[dict[str, Any]]:
    """One row a trajectory for ``samples.jsonl``; texts only where the model has a tokenizer."""
    tokenizer = load_tokenizer(model_files)
    rows = []
    for t in trajectories:
        row: dict[str, Any] = {"sample": t.sample, "index": t.prompt.index}
        if tokenizer is not None:
            row |= {
                "prompt": tokenizer.decode(t.prompt.ids),
                "response": tokenizer.decode(t.user_ids),
                "response_texts": [tokenizer.decode([token]) for token in t.response_ids],
            }
        row |= {
            "prompt_ids": t.prompt.ids,
            "response_ids": t.response_ids,
            "committed_at": t.committed_at,
            "confidence": [_short(p) for p in t.confidence],
            **_seen(views.get(t.sample, {}), len(t.response_ids), tokenizer),
            "response_tokens": t.response_tokens,
            "finish_reason": t.finish_reason,
            "forwards": t.forwards,
        }
        rows.append(t.prompt.extra | row)
    return rows


def _seen(views: Mapping[int, TokenView], tokens: int, tokenizer: Any) -> dict[str, list[Any]]:
    """What the update saw of each token, None where its state had it clean or without loss."""
    found = [views.get(position) for position in range(tokens)]
    return {
        "kl": [view and _short(view.value) for view in found],
        "teacher": [
            view
            and [
                [token if tokenizer is None else tokenizer.decode([token]), _short(p)]
                for token, p in view.teacher
            ]
            for view in found
        ],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def as_subscript(number: int) -> str:
    """As people see the pass of a token."""
    return str(number).translate(_SUBSCRIPT)


def trajectory_text(row: Mapping[str, Any]) -> str:
    """A row of ``samples.jsonl`` for people: prompt, and the response with the pass of its block
    that committed each token, ``The₁ answer₃``. Ids where the model has no tokenizer.
    """
    texts = row.get("response_texts") or [f" {token}" for token in row["response_ids"]]
    passes = map(as_subscript, row["committed_at"])
    tokens = [f"{text}{at}" for text, at in zip(texts, passes, strict=True)]
    end, prompt = row["response_tokens"], row["prompt"] if "prompt" in row else row["prompt_ids"]
    text = "\n".join(
        [
            f"prompt: {prompt}",
            f"response ({end} tokens, {row['finish_reason']}, {row['forwards']} forwards):",
            "".join(tokens[:end]),
        ]
    )
    return text.encode("utf-8", errors="backslashreplace").decode()
