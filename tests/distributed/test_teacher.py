"""Law 4: the teacher's targets are Hugging Face Qwen3's next-token distributions on the finished
sequence (1e-4), on every layout.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.conftest import END_IDS, MASK, TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS, overrides
from tests.distributed.workers import WorkerGroups
from tests.recorded import record

BLOCK = 4


@pytest.fixture(scope="module")
def rows(models: TinyModels) -> list[dict[str, Any]]:
    return record(models.hf("student", tied=True), BLOCK, seed=4)


def keys(models: TinyModels) -> list[str]:
    """Teacher and student are different models, so that one cannot stand in for the other."""
    return [
        f"model.path={models.hf('student', tied=True)}",
        f"teacher.path={models.imported('teacher', tied=True)}",
        f"model.mask_token_id={MASK}",
        f"rollout.block_size={BLOCK}",
        "update.tokens_per_microbatch=60",
    ]


@torch.no_grad()
def expected_targets(hf_dir: Path, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """log p(token at i | finished tokens before i) [counted positions, V] of every row."""
    model = oracle.load(hf_dir)
    targets = []
    for row in rows:
        prompt, response = row["prompt_ids"], row["response_ids"]
        log_p = oracle.causal_logits(model, [*prompt, *response]).log_softmax(-1)
        counted = oracle.counted_positions(response, row["masked"], END_IDS, exclude_eos=False)
        targets.append(log_p[[len(prompt) + i - 1 for i in counted]].numpy())
    return targets


def assert_targets(found: list[tuple[int, np.ndarray]], expected: list[np.ndarray]) -> None:
    assert sorted(number for number, _ in found) == list(range(len(expected)))
    assert np.concatenate(expected).std() > 1
    for number, log_p in found:
        assert log_p.shape == expected[number].shape
        if len(log_p):
            assert np.abs(log_p - expected[number]).max() < 1e-4


def test_targets_on_one_rank(models: TinyModels, rows: list[dict[str, Any]]):
    """Claim: packed and read at the masked positions, one place before each."""
    found = jobs.teacher_targets(keys(models), rows)
    assert found is not None
    assert_targets(found, expected_targets(models.hf("teacher", tied=True), rows))


def joined(parts: list[list[tuple[int, np.ndarray]]]) -> list[tuple[int, np.ndarray]]:
    """What the context ranks have of every row, in their order."""
    return [
        (same[0][0], np.concatenate([log_p for _, log_p in same]))
        for same in zip(*parts, strict=True)
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cp2", "pp2-cp2", "tp2-cp2-sp"])
def test_targets_of_context_ranks(
    models: TinyModels, ranks: WorkerGroups, rows: list[dict[str, Any]], name: str
):
    """Claim: each context rank keeps the targets of its own part of the student's rows and no
    others; together they are all targets."""
    number, layout = LAYOUTS[name]
    results = ranks(number).run(
        jobs.teacher_targets, overrides=[*keys(models), *overrides(layout)], rows=rows
    )
    expected = expected_targets(models.hf("teacher", tied=True), rows)
    on_last_stage = [found for found in results if found is not None]
    assert len(on_last_stage) == layout.tensor * layout.context
    for i in range(layout.tensor):  # tensor ranks are neighbours
        assert_targets(joined(on_last_stage[i :: layout.tensor]), expected)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2", "tp2-sp", "tp2-pp2-sp"])
def test_targets_on_layouts(
    models: TinyModels, ranks: WorkerGroups, rows: list[dict[str, Any]], name: str
):
    """Claim: the same on every layout; replicas share the rows out."""
    number, layout = LAYOUTS[name]
    results = ranks(number).run(
        jobs.teacher_targets, overrides=[*keys(models), *overrides(layout)], rows=rows
    )
    expected = expected_targets(models.hf("teacher", tied=True), rows)
    if name == "dp2":
        assert_targets([*results[0], *results[1]], expected)
        return
    on_last_stage = [found for found in results if found is not None]
    assert len(on_last_stage) == layout.tensor
    for found in on_last_stage:
        assert_targets(found, expected)
