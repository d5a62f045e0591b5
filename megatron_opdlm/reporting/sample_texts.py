"""Trajectories as rows that people read: texts beside ids, and when each token was committed."""

from collections.abc import Sequence
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
