"""Law 5: value and gradient in one chunked pass = autograd through the dense formula: 1e-10 in
float64; 1e-5 relative + 1e-6 nats in float32.
"""

import math
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.denoising import WHOLE
from megatron_opdlm.divergence import (
    STUDENT_FAULT,
    TEACHER_FAULT,
    Divergence,
    Loss,
    distillation_loss,
    likelihood_loss,
)
from tests import oracle

FAULT = {"teacher": TEACHER_FAULT, "student": STUDENT_FAULT}
TAILS = ("drop", "renormalise", "bucket")
FULL = {
    "forward_kl": Divergence(),
    "reverse_kl": Divergence(kind="reverse_kl"),
    "mixed": Divergence(kind="mixed", reverse_weight=0.3),
    "jsd": Divergence(kind="jsd"),
    "jsd-uneven": Divergence(kind="jsd", jsd_alpha=0.2),
}
RESHAPED = {
    "hot": Divergence(teacher_temperature=1.7),
    "cold-reverse": Divergence(kind="reverse_kl", teacher_temperature=0.6),
    "nucleus": Divergence(teacher_top_p=0.7),
    "hot-nucleus-jsd": Divergence(kind="jsd", teacher_temperature=1.5, teacher_top_p=0.6),
    "nucleus-of-one": Divergence(teacher_top_p=1e-6),
}
LOSSES: dict[str, Divergence | None] = {
    "nll": None,
    **FULL,
    **RESHAPED,
    **{f"{n}-top4-{t}": replace(FULL[n], top_k=4, top_k_tail=t) for n, t in product(FULL, TAILS)},
    **{f"top{k}-{t}": Divergence(top_k=k, top_k_tail=t) for k, t in product((1, 10), TAILS)},
    **{
        f"{n}-top3-{t}": replace(RESHAPED[n], top_k=3, top_k_tail=t)
        for n, t in product(("hot", "nucleus", "hot-nucleus-jsd"), TAILS)
    },
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


def chunked(
    inputs: Inputs,
    divergence: Divergence | None,
    chunk_rows: int,
    gradient_sum: Tensor | None = None,
) -> Loss:
    """The loss under test; no divergence means the likelihood of the labels."""
    common: Any = {"columns": REAL, "reduction": WHOLE, "chunk_rows": chunk_rows}
    common["gradient_sum"] = gradient_sum
    student = inputs.student, inputs.student_weight
    if divergence is None:
        return likelihood_loss(*student, inputs.labels, inputs.row_weight, **common)
    teacher = inputs.teacher, inputs.teacher_weight
    return distillation_loss(*student, *teacher, inputs.row_weight, divergence, **common)


def oracle_options(divergence: Divergence) -> dict[str, Any]:
    """The same settings in the oracle's words."""
    names = {
        "jsd_alpha": "alpha",
        "top_k_tail": "tail",
        "teacher_temperature": "temperature",
        "teacher_top_p": "top_p",
    }
    options = {names.get(key, key): value for key, value in asdict(divergence).items()}
    unused = {"jsd": ("reverse_weight",), "mixed": ("alpha",)}
    return {
        key: value
        for key, value in options.items()
        if key not in unused.get(divergence.kind, ("reverse_weight", "alpha"))
    }


def expected_values(inputs: Inputs, divergence: Divergence | None) -> Tensor:
    """The dense formula on the real columns, in float64."""
    hidden, weight = inputs.student.double(), inputs.student_weight.double()
    log_q = F.linear(hidden, weight[:REAL]).log_softmax(-1)
    if divergence is None:
        return F.nll_loss(log_q, inputs.labels, reduction="none")
    logits = F.linear(inputs.teacher.double(), inputs.teacher_weight[:REAL].double())
    return oracle.distillation(teacher_logits=logits, log_q=log_q, **oracle_options(divergence))


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


DTYPES = torch.float64, torch.float32
SCALES = 1.0, 8.0  # smooth and peaked distributions
CHUNKS = 1, 3, 7, 64


def settings_of(name: str) -> list[tuple[int, float, torch.dtype]]:
    """Every chunk of rows, and every scale with every dtype; the losses take turns in which of them
    meet."""
    turn = list(LOSSES).index(name)
    kinds = list(product(SCALES, DTYPES))
    return [(chunk, *kinds[(i + turn) % 4]) for i, chunk in enumerate(CHUNKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, subtests: pytest.Subtests, monkeypatch: pytest.MonkeyPatch):
    """Claim: for every loss, any chunk of rows, compared two rows at a time, and -inf padding: each
    position's value, the weighted sum, and its gradients with respect to hidden states and output
    weight; the padding's rows get none."""
    monkeypatch.setattr("megatron_opdlm.divergence.PIECE", 2 * COLUMNS + 1)
    for chunk_rows, scale, dtype in settings_of(name):
        with subtests.test(chunk_rows=chunk_rows, scale=scale, dtype=dtype):
            assert_the_dense_formula(name, chunk_rows, scale, dtype)


def assert_the_dense_formula(name: str, chunk_rows: int, scale: float, dtype: torch.dtype) -> None:
    rows, factor = 7, 2.5  # the caller scales the loss: the gradient must follow
    inputs = make_inputs(rows, scale, dtype)
    total, values, faults = chunked(inputs, LOSSES[name], chunk_rows)
    (total * factor).backward()
    found = inputs.student.grad, inputs.student_weight.grad
    inputs.student.grad = inputs.student_weight.grad = None

    expected = expected_values(inputs, LOSSES[name])
    expected_total = (expected * inputs.row_weight.double()).sum()
    (expected_total * factor).backward()
    expected_gradients = inputs.student.grad, inputs.student_weight.grad

    assert not values.requires_grad and values.shape == (rows,)
    assert faults.shape == (rows,) and not faults.any()
    for ours, dense in ((values, expected), (total, expected_total)):
        assert_values(ours, dense)
    for ours, dense in zip(found, expected_gradients, strict=True):
        assert_gradient(ours, dense)
    assert found[1] is not None and not found[1][REAL:].any()


def test_gradients_are_added_to_a_given_sum():
    """Claim: the weight's gradient goes on top of what is there and nowhere else; a loss whose own
    gradient is not 1 is refused, since that is too late to be known."""
    inputs = make_inputs(7, 1.0, torch.float64)
    chunked(inputs, Divergence(), 3).total.backward()
    expected, hidden = inputs.student_weight.grad, inputs.student.grad
    assert expected is not None and hidden is not None
    inputs.student.grad = inputs.student_weight.grad = None
    given = torch.randn_like(expected)
    summed = given.clone()
    total = chunked(inputs, Divergence(), 3, summed).total
    total.backward(retain_graph=True)
    torch.testing.assert_close(summed, given + expected)
    assert inputs.student_weight.grad is None and inputs.student.grad is not None
    assert torch.equal(inputs.student.grad, hidden)
    with pytest.raises(RuntimeError, match="got zero"):
        (chunked(inputs, Divergence(), 3, summed).total * 2).backward()


PROPER = [name for name in LOSSES if name.startswith(tuple(FULL)) and not name.endswith("-drop")]


@pytest.mark.parametrize("name", PROPER)
def test_equal_distributions(name: str):
    """Claim: where the student is the teacher, the divergence and its gradient vanish."""
    inputs = make_inputs(5, 2.0, torch.float32)
    inputs.teacher, inputs.teacher_weight = inputs.student.detach(), inputs.student_weight.detach()
    total, values, _ = chunked(inputs, LOSSES[name], 2)
    total.backward()
    assert inputs.student.grad is not None
    assert float(values.abs().max()) < 1e-6 and float(inputs.student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_certain_distributions(name: str):
    """Claim: where probabilities underflow to 0, everything stays finite and right."""
    certain = make_inputs(5, 300.0, torch.float32)
    assert float(certain.student.detach().abs().max()) > 300
    total, values, faults = chunked(certain, LOSSES[name], 2)
    total.backward()
    assert certain.student.grad is not None and certain.student_weight.grad is not None
    assert not faults.any()
    for tensor in (values, certain.student.grad, certain.student_weight.grad):
        assert bool(torch.isfinite(tensor).all())
    torch.testing.assert_close(
        values.double(), expected_values(certain, LOSSES[name]).detach(), rtol=1e-5, atol=1e-4
    )


def values_and_gradients(divergence: Divergence) -> list[Tensor]:
    inputs = make_inputs(7, 2.0, torch.float64)
    total, values, _ = chunked(inputs, divergence, 3)
    total.backward()
    assert inputs.student.grad is not None and inputs.student_weight.grad is not None
    return [values, inputs.student.grad, inputs.student_weight.grad]


@pytest.mark.parametrize("name", FULL)
def test_k_of_the_whole_vocabulary_is_the_full_loss(name: str, subtests: pytest.Subtests):
    """Claim: with k at least the vocabulary, every treatment of the (empty) tail is the full
    loss."""
    expected = values_and_gradients(FULL[name])
    for k, tail in product((REAL, REAL + 1, 10**9), TAILS):
        with subtests.test(k=k, tail=tail):
            found = values_and_gradients(replace(FULL[name], top_k=k, top_k_tail=tail))
            for ours, whole in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, whole, **EXACT)


def test_top_k_is_the_references():
    """Claim: nothing is renormalised: the value is the partial sum, can be negative, and the
    gradient with respect to student logit j is P q_j - p_j [j in S] (DESIGN, "Top-k")."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04], dtype=torch.float64)
    q = torch.tensor([0.6, 0.35, 0.03, 0.01, 0.01], dtype=torch.float64)
    student = q.log()[None].requires_grad_()  # hidden states that are the logits
    identity = torch.eye(5, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    total, values, _ = distillation_loss(
        student,
        identity,
        p.log()[None],
        identity,
        one,
        Divergence(top_k=2),
        columns=5,
        reduction=WHOLE,
        chunk_rows=1,
    )
    total.backward()
    expected = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.35)
    assert values.tolist() == pytest.approx([expected]) and expected < 0
    gradient = 0.8 * q - torch.tensor([0.5, 0.3, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(student.grad, gradient[None], **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_at_all(name: str):
    """Claim: a microbatch without counted positions has loss 0 and gradients 0, not none."""
    inputs = make_inputs(0, 1.0, torch.float32)
    total, values, _ = chunked(inputs, LOSSES[name], 4)
    total.backward()
    assert float(total) == 0 and values.shape == (0,)
    assert inputs.student_weight.grad is not None and not inputs.student_weight.grad.any()


def test_a_frozen_output_weight_gets_no_gradient():
    """Claim: only what asks for a gradient costs one."""
    inputs = make_inputs(4, 1.0, torch.float32)
    inputs.student_weight = inputs.student_weight.detach()
    total, *_ = chunked(inputs, Divergence(), 2)
    total.backward()
    assert inputs.student.grad is not None and inputs.student_weight.grad is None


@dataclass(frozen=True)
class Poison:
    """A number that is put into a model's output weight or one of its hidden states."""

    whose: str
    place: str
    number: float


POISONS = [
    Poison(*parts)
    for parts in product(("teacher", "student"), ("weight", "hidden"), (math.nan, math.inf))
] + [Poison("teacher", "weight", -math.inf), Poison("student", "weight", -math.inf)]


@pytest.mark.parametrize("name", LOSSES)
def test_a_value_that_is_not_finite_is_reported(name: str, subtests: pytest.Subtests):
    """Claim: one NaN or infinity, also where the other model's probability is 0 and also one that
    makes its own probability 0, marks exactly the positions that it reaches, as the teacher's or
    the student's."""
    for poison in POISONS:
        with subtests.test(poison=poison):
            assert_reported(name, poison)


def assert_reported(name: str, poison: Poison) -> None:
    inputs = make_inputs(5, 300.0, torch.float32)  # nearly every probability is 0
    student = inputs.student.detach(), inputs.student_weight.detach()
    hidden, weight = (
        student if poison.whose == "student" else (inputs.teacher, inputs.teacher_weight)
    )
    hidden.abs_()  # so that an infinite weight makes a logit of its own sign
    if poison.place == "weight":
        weight[4, 1] = poison.number
        reached = [True] * 5
    else:
        hidden[2, 0] = poison.number
        reached = [False, False, True, False, False]
    expected = 0 if LOSSES[name] is None and poison.whose == "teacher" else FAULT[poison.whose]
    faults = chunked(inputs, LOSSES[name], 2).fault_M
    assert faults.tolist() == [expected * here for here in reached]
