"""Law 5: value and gradient in one chunked pass = autograd through the dense formula: 1e-10 in
float64; 1e-5 relative + 1e-6 nats in float32.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.denoising import WHOLE
from megatron_opdlm.divergence import Divergence, distillation_loss, likelihood_loss
from tests import oracle

KINDS = {
    "forward_kl": ("forward_kl", {}),
    "reverse_kl": ("reverse_kl", {}),
    "mixed": ("mixed", {"reverse_weight": 0.3}),
    "jsd": ("jsd", {"alpha": 0.5}),
    "jsd-uneven": ("jsd", {"alpha": 0.2}),
    "nll": ("nll", {}),
}
REAL, COLUMNS, STUDENT_H, TEACHER_H = 11, 13, 6, 9  # two columns pad a layout; widths differ

EXACT = {"rtol": 0.0, "atol": 1e-10}


@dataclass
class Inputs:
    """Hidden states [M, H] and output weights [columns, H] of both models."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    row_weight: Tensor


def make_inputs(rows: int, scale: float, dtype: torch.dtype) -> Inputs:
    """``scale`` sets how peaked the distributions are: their logits' standard deviation."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Inputs(
        student=(scale * normal(rows, STUDENT_H)).to(dtype).requires_grad_(),
        student_weight=(normal(COLUMNS, STUDENT_H) * STUDENT_H**-0.5).to(dtype).requires_grad_(),
        teacher=(scale * normal(rows, TEACHER_H)).to(dtype),
        teacher_weight=(normal(COLUMNS, TEACHER_H) * TEACHER_H**-0.5).to(dtype),
        labels=torch.randint(REAL, (rows,), generator=generator),
        row_weight=torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype),
    )


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits with the layout's padding at -inf."""
    padding = torch.arange(COLUMNS) >= REAL
    return F.linear(hidden, weight).masked_fill(padding, -torch.inf)


def chunked(inputs: Inputs, name: str, chunk_rows: int) -> tuple[Tensor, Tensor]:
    kind, options = KINDS[name]
    common: Any = {"project": project, "reduction": WHOLE, "chunk_rows": chunk_rows}
    student = inputs.student, inputs.student_weight
    if kind == "nll":
        return likelihood_loss(*student, inputs.labels, inputs.row_weight, **common)
    settings = {"jsd_alpha" if key == "alpha" else key: value for key, value in options.items()}
    divergence = Divergence(kind=kind, **settings)
    teacher = inputs.teacher, inputs.teacher_weight
    return distillation_loss(*student, *teacher, inputs.row_weight, divergence, **common)


def expected_values(inputs: Inputs, name: str) -> Tensor:
    """The dense formula on the real columns, in float64."""
    kind, options = KINDS[name]
    hidden, weight = inputs.student.double(), inputs.student_weight.double()
    log_q = F.linear(hidden, weight[:REAL]).log_softmax(-1)
    if kind == "nll":
        return F.nll_loss(log_q, inputs.labels, reduction="none")
    teacher = F.linear(inputs.teacher.double(), inputs.teacher_weight[:REAL].double())
    return oracle.divergence(kind, teacher.log_softmax(-1), log_q, **options)


def assert_values(found: Tensor, expected: Tensor) -> None:
    """Element by element."""
    tolerance = EXACT if found.dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.double(), expected.double(), **tolerance)


def assert_gradient(found: Tensor | None, expected: Tensor | None) -> None:
    """In float32 in norm: an element is a sum over rows, which can cancel."""
    assert found is not None and expected is not None
    if found.dtype is torch.float64:
        torch.testing.assert_close(found, expected, **EXACT)
    else:
        difference = (found.double() - expected.double()).norm()
        assert float(difference) < 1e-5 * float(expected.norm()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["smooth", "peaked"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 64])
@pytest.mark.parametrize("name", KINDS)
def test_value_and_gradients(name: str, chunk_rows: int, scale: float, dtype: torch.dtype):
    """Claim: for every loss, any chunk of rows and -inf padding: each position's value, the
    weighted sum, and its gradients with respect to hidden states and output weight; the padding's
    rows get none."""
    rows, factor = 7, 2.5  # the caller scales the loss: the gradient must follow
    inputs = make_inputs(rows, scale, dtype)
    total, values = chunked(inputs, name, chunk_rows)
    (total * factor).backward()
    found = inputs.student.grad, inputs.student_weight.grad
    inputs.student.grad = inputs.student_weight.grad = None

    expected = expected_values(inputs, name)
    expected_total = (expected * inputs.row_weight.double()).sum()
    (expected_total * factor).backward()
    expected_gradients = inputs.student.grad, inputs.student_weight.grad

    assert not values.requires_grad and values.shape == (rows,)
    for ours, dense in ((values, expected), (total, expected_total)):
        assert_values(ours, dense)
    for ours, dense in zip(found, expected_gradients, strict=True):
        assert_gradient(ours, dense)
    assert found[1] is not None and not found[1][REAL:].any()


@pytest.mark.parametrize("name", KINDS)
def test_equal_distributions_and_certain_ones(name: str):
    """Claim: where the student is the teacher, divergences and their gradients vanish; where
    probabilities underflow to 0, everything stays finite."""
    inputs = make_inputs(5, 2.0, torch.float32)
    inputs.teacher, inputs.teacher_weight = inputs.student.detach(), inputs.student_weight.detach()
    total, values = chunked(inputs, name, 2)
    if name != "nll":
        total.backward()
        assert inputs.student.grad is not None
        assert float(values.abs().max()) < 1e-6 and float(inputs.student.grad.abs().max()) < 1e-6
    certain = make_inputs(5, 300.0, torch.float32)
    assert float(certain.student.detach().abs().max()) > 300
    total, values = chunked(certain, name, 2)
    total.backward()
    assert certain.student.grad is not None and certain.student_weight.grad is not None
    for tensor in (values, certain.student.grad, certain.student_weight.grad):
        assert bool(torch.isfinite(tensor).all())
    torch.testing.assert_close(
        values.double(), expected_values(certain, name).detach(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("name", KINDS)
def test_no_rows_at_all(name: str):
    """Claim: a microbatch without counted positions has loss 0 and gradients 0, not none."""
    inputs = make_inputs(0, 1.0, torch.float32)
    total, values = chunked(inputs, name, 4)
    total.backward()
    assert float(total) == 0 and values.shape == (0,)
    assert inputs.student_weight.grad is not None and not inputs.student_weight.grad.any()


def test_a_frozen_output_weight_gets_no_gradient():
    """Claim: only what asks for a gradient costs one."""
    inputs = make_inputs(4, 1.0, torch.float32)
    inputs.student_weight = inputs.student_weight.detach()
    total, _ = chunked(inputs, "forward_kl", 2)
    total.backward()
    assert inputs.student.grad is not None and inputs.student_weight.grad is None
