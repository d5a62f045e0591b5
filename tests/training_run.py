"""A small training run, and which of its numbers another start of it must repeat."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.conftest import LAST_TOKEN, MASK

STEPS = 8
EVERY = 2
# Wall-clock and memory are not part of the law; everything else is.
MEASURED = ("seconds", "per_second", "peak_memory_bytes", "slowest_rank")


def write_prompts(path: Path, count: int = 13) -> Path:
    """A prompts file; the odd number makes steps reach into the next epoch."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        torch.randint(LAST_TOKEN - 2, (1 + i % 7,), generator=generator).tolist()
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
    return path


def overrides(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    """Eight steps of three updates; drawn tokens, growing length, a warm-up and a decay."""
    return [
        f"model.path={model}",
        f"data.path={prompts}",
        f"train.out={out}",
        f"model.mask_token_id={MASK}",
        "data.epochs=9",
        f"train.steps={STEPS}",
        f"checkpoint.every={EVERY}",
        "checkpoint.keep=9",
        "rollout.prompts_per_step=5",
        "rollout.max_new_tokens=8",
        "rollout.threshold=0.4",
        "curriculum.start=4",
        "curriculum.end=8",
        "curriculum.steps=4",
        "optimizer.batch_size=2",
        "optimizer.lr=2e-3",
        "optimizer.min_lr=2e-4",
        "optimizer.warmup_steps=2",
        "logging.tensorboard=false",
        *more,
    ]


def metrics(out: Path) -> list[dict[str, Any]]:
    """One row a step, without what a clock measured."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not any(word in key for word in MEASURED)}
        for row in rows
    ]


def assert_steps(rows: Sequence[dict[str, Any]]) -> None:
    """Every step once, in order, and something happened in it."""
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert len({row["max_new_tokens"] for row in rows}) > 1
