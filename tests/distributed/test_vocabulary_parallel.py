"""Laws 5 and 6 with the vocabulary split over tensor ranks: not gathered, and nothing changes."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_opdlm.diffusion import denoising, randomness, truncation
from megatron_opdlm.parallel import Layout
from tests.distributed import jobs
from tests.distributed.layouts import TP2
from tests.distributed.workers import WorkerGroups
from tests.unit.diffusion.test_denoising import SHAPINGS, chi_square, drawing_cases
from tests.unit.diffusion.test_truncation import MASSES, distributions, expected_top_k
from tests.unit.test_divergence import (
    FAULT,
    LOSSES,
    REAL,
    assert_gradient,
    assert_values,
    expected_values,
    make_inputs,
)

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["smooth", "peaked"])
@pytest.mark.parametrize("name", LOSSES)
def test_divergences(ranks: WorkerGroups, name: str, scale: float, dtype: torch.dtype):
    """Claim: values, and gradients summed over the ranks, are those of the dense formula; the odd
    vocabulary leaves a padding row, which gets no gradient."""
    inputs = make_inputs(7, scale, dtype)
    expected = expected_values(inputs, LOSSES[name])
    (expected * inputs.row_weight.double()).sum().backward()
    results = ranks(2).run(
        jobs.divergence_over_shards,
        layout=TP2,
        divergence=LOSSES[name],
        student=(inputs.student.detach().numpy(), inputs.student_weight.detach()[:REAL].numpy()),
        teacher=(inputs.teacher.numpy(), inputs.teacher_weight[:REAL].numpy()),
        labels=inputs.labels.numpy(),
        row_weight=inputs.row_weight.numpy(),
        chunk_rows=3,
    )
    assert inputs.student_weight.grad is not None
    for found in results:
        hidden, weight = torch.from_numpy(found["hidden"]), torch.from_numpy(found["weight"])
        assert_values(torch.from_numpy(found["values"]), expected.detach())
        assert not found["faults"].any()
        assert_gradient(hidden, inputs.student.grad)
        assert_gradient(weight, inputs.student_weight.grad[:REAL])


TRUNCATIONS = list(zip([1, 3, 6, 13, 10**9], [*MASSES, 0.5], strict=True))


@pytest.mark.parametrize(("k", "top_p"), TRUNCATIONS)
def test_truncations(ranks: WorkerGroups, k: int, top_p: float):
    """Claim: the k largest entries and the nucleus are those of one process, ties included."""
    log_p = distributions()
    arguments = {"layout": TP2, "log_p": log_p.numpy(), "k": k, "top_p": top_p}
    expected = truncation.nucleus(log_p.clone(), top_p, denoising.WHOLE)
    for chosen, kept in ranks(2).run(jobs.truncations_over_shards, **arguments):
        assert np.array_equal(chosen, expected_top_k(log_p, k).numpy())
        np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("column", [0, REAL - 1])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", FAULT)
def test_faults(ranks: WorkerGroups, whose: str, number: float, column: int):
    """Claim: a logit that is not finite in one rank's columns is reported on every rank."""
    inputs = make_inputs(7, 1.0, torch.float32)
    hidden = inputs.student.detach() if whose == "student" else inputs.teacher
    weight = inputs.student_weight.detach() if whose == "student" else inputs.teacher_weight
    hidden.abs_()  # so that an infinite weight makes a logit of its own sign
    weight[column, 1] = number
    results = ranks(2).run(
        jobs.divergence_over_shards,
        layout=TP2,
        divergence=LOSSES["forward_kl"],
        student=(inputs.student.detach().numpy(), inputs.student_weight.detach()[:REAL].numpy()),
        teacher=(inputs.teacher.numpy(), inputs.teacher_weight[:REAL].numpy()),
        labels=inputs.labels.numpy(),
        row_weight=inputs.row_weight.numpy(),
        chunk_rows=3,
    )
    for found in results:
        assert found["faults"].tolist() == [FAULT[whose]] * 7


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_draws(ranks: WorkerGroups, shaping: dict[str, Any]):
    """Claim: every rank draws the token that one process draws from all logits, ties and forbidden
    columns included."""
    logits, uniform = drawing_cases()
    expected = denoising.draw(logits, uniform, **shaping)
    results = ranks(2).run(
        jobs.draw_over_shards,
        layout=TP2,
        logits=logits.numpy(),
        uniform=uniform.numpy(),
        **shaping,
    )
    for token, confidence, entropy in results:
        assert np.array_equal(token, expected.token.numpy())
        np.testing.assert_allclose(confidence, expected.confidence.numpy(), rtol=1e-6)
        np.testing.assert_allclose(entropy, expected.entropy.numpy(), rtol=1e-5, atol=1e-6)


def test_frequencies(ranks: WorkerGroups):
    """Claim: tokens of both shards come with the softmax's frequencies (chi-square within 4
    standard deviations)."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(1))
    uniform = randomness.uniform(6, torch.arange(100)[:, None], torch.arange(100)).flatten()
    rows = logits.expand(len(uniform), -1).contiguous().numpy()
    results = ranks(2).run(
        jobs.draw_over_shards, layout=TP2, logits=rows, uniform=uniform.numpy(), temperature=1.0
    )
    assert np.array_equal(results[0][0], results[1][0])
    counts = torch.bincount(torch.from_numpy(results[0][0]), minlength=11).float()
    assert abs(chi_square(counts, logits.softmax(-1))) < 4


def test_the_shards_of_one_rank_are_the_whole():
    """Claim: the code path of tensor ranks on one rank changes no bit."""
    logits, uniform = drawing_cases()
    shaping = {"temperature": 0.8, "top_k": 6, "top_p": 0.55}
    expected = denoising.draw(logits, uniform, **shaping)
    found = jobs.draw_over_shards(Layout(), logits.numpy(), uniform.numpy(), **shaping)
    assert np.array_equal(found[0], expected.token.numpy())
    assert np.array_equal(found[1], expected.confidence.numpy())
