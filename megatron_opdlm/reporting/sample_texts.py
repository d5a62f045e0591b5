"""Trajectories as rows that people read: texts beside ids, and when each token was committed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.records import Trajectory


def sample_rows(trajectories: Sequence[Trajectory], model_files: Path) -> list[dict[str, Any]]:
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
            "response_tokens": t.response_tokens,
            "finish_reason": t.finish_reason,
            "forwards": t.forwards,
        }
        rows.append(t.prompt.extra | row)
    return rows


_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def trajectory_text(row: Mapping[str, Any]) -> str:
    """A row of ``samples.jsonl`` for people: prompt, and the response with the pass of its block
    that committed each token, ``The₁ answer₃``. Ids where the model has no tokenizer.
    """
    texts = row.get("response_texts") or [f" {token}" for token in row["response_ids"]]
    passes = (str(at).translate(_SUBSCRIPT) for at in row["committed_at"])
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
