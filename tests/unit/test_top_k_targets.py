"""The second form of the targets: every top-k loss from kept entries is the one from hidden states.

That one is held to the dense formula by test_divergence.py, and both forms to transformers, over
layouts, by tests/distributed/test_losses.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_opdlm.diffusion.denoising import WHOLE
from megatron_opdlm.divergence import TEACHER_FAULT, Divergence, Loss
from megatron_opdlm.top_k_targets import TopK, keep_top_k, top_k_loss
from tests.unit.test_divergence import (
    LOSSES,
    REAL,
    Inputs,
    assert_gradient,
    assert_values,
    chunked,
    make_inputs,
)

TOP_K = [name for name, divergence in LOSSES.items() if divergence and divergence.top_k]
ROWS = 23


def kept(inputs: Inputs, divergence: Divergence, chunk_rows: int) -> TopK:
    common: Any = {"columns": REAL, "reduction": WHOLE, "chunk_rows": chunk_rows}
    return keep_top_k(inputs.teacher, inputs.teacher_weight, divergence, **common)


def loss_of(inputs: Inputs, targets: TopK, divergence: Divergence, chunk_rows: int) -> Loss:
    common: Any = {"columns": REAL, "reduction": WHOLE, "chunk_rows": chunk_rows}
    student = inputs.student, inputs.student_weight
    return top_k_loss(*student, targets, inputs.row_weight, divergence, **common)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [0.3, 12.0])
@pytest.mark.parametrize("name", TOP_K)
def test_values_and_gradients(name: str, scale: float, dtype: torch.dtype):
    """Claim: values and gradients agree, rows picked in another order and used twice, in chunks of
    another size than they were made in."""
    divergence = LOSSES[name]
    assert divergence is not None
    inputs, same = make_inputs(ROWS, scale, dtype), make_inputs(ROWS, scale, dtype)
    order = torch.arange(ROWS - 1, -1, -1)
    turned = kept(inputs, divergence, 7).select(order)
    found = loss_of(inputs, turned.select(order), divergence, 5)
    expected = chunked(same, divergence, 9)
    found.total.backward()
    expected.total.backward()
    assert_values(found.value_M, expected.value_M)
    assert not found.fault_M.any()
    assert_gradient(inputs.student.grad, same.student.grad)
    assert_gradient(inputs.student_weight.grad, same.student_weight.grad)


def test_what_is_kept():
    """Claim: the k likeliest tokens, normalised over the whole vocabulary; no column that pads the
    layout; the rest weighs what they leave."""
    inputs, divergence = make_inputs(ROWS, 2.0, torch.float64), Divergence(top_k=3)
    targets = kept(inputs, divergence, 4)
    log_p = (inputs.teacher @ inputs.teacher_weight[:REAL].t()).log_softmax(-1)
    for row, columns in enumerate(targets.column_Mk.tolist()):
        assert set(columns) == set(log_p[row].topk(3).indices.tolist())
        torch.testing.assert_close(targets.log_p_Mk[row], log_p[row, columns])
    whole = targets.log_p_Mk.exp().sum(-1) + targets.log_rest_M.exp()
    torch.testing.assert_close(whole, torch.ones_like(whole))


@pytest.mark.parametrize("k", [REAL - 1, REAL, REAL + 5])
def test_more_entries_than_tokens(k: int):
    """Claim: k as large as the vocabulary is the full loss."""
    full = Divergence(kind="jsd")
    inputs, same = make_inputs(ROWS, 2.0, torch.float64), make_inputs(ROWS, 2.0, torch.float64)
    divergence = replace(full, top_k=k, top_k_tail="bucket")
    found = loss_of(inputs, kept(inputs, divergence, 4), divergence, 6)
    assert_values(found.value_M, chunked(same, full, 6).value_M)


def test_no_rows_at_all():
    inputs, divergence = make_inputs(0, 1.0, torch.float32), Divergence(top_k=3)
    found = loss_of(inputs, kept(inputs, divergence, 4), divergence, 6)
    assert found.value_M.shape == (0,) and found.total.detach() == 0


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_fault_of_the_teacher_is_kept(number: float):
    """Claim: a row whose logits were not finite is still reported when its entries are used."""
    inputs, divergence = make_inputs(ROWS, 1.0, torch.float32), Divergence(top_k=3)
    inputs.teacher[5, 2] = number
    fault = loss_of(inputs, kept(inputs, divergence, 4), divergence, 6).fault_M
    assert fault[5] == TEACHER_FAULT and int((fault > 0).sum()) == 1
