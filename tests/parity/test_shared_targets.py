"""States of one sequence share its targets and its update, in any order and packing: the teacher is
asked once, and the numbers are those of every state computed by itself.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import oracle
from tests.conftest import END_IDS, MASK, TinyModels
from tests.distributed import jobs
from tests.recorded import GRADIENT_TOLERANCE, LOSS_TOLERANCE, PLAIN, Recorded, distance, length


@pytest.fixture(scope="module")
def recorded(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(models, tmp_path_factory.mktemp("recorded"))


def several_states(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sequence with all its response masked, as it was, and the complement of that: where a
    block of the last has nothing masked it is not in the noisy copy."""
    masks = [
        [[1] * len(row["masked"]) for row in rows],
        [row["masked"] for row in rows],
        [[1 - m for m in row["masked"]] for row in rows],
    ]
    return [row | {"masked": m} for each in masks for row, m in zip(rows, each, strict=True)]


@pytest.mark.parametrize("tokens", [1, 77, 100000])
@pytest.mark.parametrize("stride", [1, 5])
def test_states_of_one_sequence(
    models: TinyModels, recorded: Recorded, tmp_path: Path, tokens: int, stride: int
):
    """Claim: loss, gradient norm and gradients of three states of every sequence are the oracle's,
    for any budget and order."""
    rows = several_states(recorded.rows(PLAIN))
    rows = [row for first in range(stride) for row in rows[first::stride]]
    path = tmp_path / "states.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [*recorded.overrides(PLAIN), f"update.tokens_per_microbatch={tokens}"]
    found = jobs.replay_with_gradients(keys, path)
    student, teacher = (oracle.load(models.hf(r, tied=PLAIN.tied)) for r in ("student", "teacher"))
    options = {"block_size": PLAIN.block_size, "mask_id": MASK, "end_ids": END_IDS}
    losses = oracle.loss(student, teacher, rows, **options)
    np.testing.assert_allclose(
        found["per_sequence"], [loss.item() for loss in losses], rtol=LOSS_TOLERANCE, atol=1e-6
    )
    (sum(losses) / len(losses)).backward()
    assert found["grad_norm"] == pytest.approx(oracle.gradient_norm(student), rel=LOSS_TOLERANCE)
    expected = {name: g.numpy() for name, g in oracle.gradients(student).items()}
    assert distance(found["gradients"], expected) < GRADIENT_TOLERANCE * length(expected)
