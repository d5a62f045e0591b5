"""Laws 5 and 6 with the vocabulary split over tensor ranks: not gathered, and nothing changes."""

from itertools import product
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
    DTYPES,
    FAULT,
    LOSSES,
    REAL,
    SCALES,
    Inputs,
    assert_gradient,
    assert_values,
    expected_values,
    make_inputs,
)

pytestmark = pytest.mark.distributed


def arguments_of(inputs: Inputs, name: str) -> dict[str, Any]:
    """Of ``jobs.divergence_over_shards``."""
    return {
        "divergence": LOSSES[name],
        "student": (
            inputs.student.detach().numpy(),
            inputs.student_weight.detach()[:REAL].numpy(),
        ),
        "teacher": (inputs.teacher.numpy(), inputs.teacher_weight[:REAL].numpy()),
        "labels": inputs.labels.numpy(),
        "row_weight": inputs.row_weight.numpy(),
        "chunk_rows": 3,
    }


def test_divergences(ranks: WorkerGroups, subtests: pytest.Subtests):
    """Claim: for every loss, smooth and peaked, in both types, values, and gradients summed over
    the ranks, are those of the dense formula; the odd vocabulary leaves a padding row, which gets
    no gradient."""
    # Both scales and both types for every loss; which of them meet alternates.
    pairs = [list(zip(SCALES, types, strict=True)) for types in (DTYPES, DTYPES[::-1])]
    cases = [(name, *pair) for i, name in enumerate(LOSSES) for pair in pairs[i % 2]]
    inputs = [make_inputs(7, scale, dtype) for _, scale, dtype in cases]
    arguments = [arguments_of(i, name) for i, (name, *_) in zip(inputs, cases, strict=True)]
    results = ranks(2).run_each(jobs.divergence_over_shards, arguments, layout=TP2)
    for case, given, found in zip(cases, inputs, results, strict=True):
        with subtests.test(case=case):
            expected = expected_values(given, LOSSES[case[0]])
            (expected * given.row_weight.double()).sum().backward()
            for of_rank in found:
                assert_the_dense_formula(of_rank, given, expected)


def assert_the_dense_formula(found: dict[str, Any], given: Inputs, expected: torch.Tensor) -> None:
    """``given`` holds the expected gradients."""
    assert given.student_weight.grad is not None
    assert not found["faults"].any()
    assert_values(torch.from_numpy(found["values"]), expected.detach())
    assert_gradient(torch.from_numpy(found["hidden"]), given.student.grad)
    assert_gradient(torch.from_numpy(found["weight"]), given.student_weight.grad[:REAL])


TRUNCATIONS = list(zip([1, 3, 6, 13, 10**9], [*MASSES, 0.5], strict=True))


def test_truncations(ranks: WorkerGroups, subtests: pytest.Subtests):
    """Claim: the k largest entries and the nucleus are those of one process, ties included."""
    log_p = distributions()
    cases = [{"k": k, "top_p": top_p} for k, top_p in TRUNCATIONS]
    results = ranks(2).run_each(
        jobs.truncations_over_shards, cases, layout=TP2, log_p=log_p.numpy()
    )
    for (k, top_p), found in zip(TRUNCATIONS, results, strict=True):
        with subtests.test(k=k, top_p=top_p):
            expected = truncation.nucleus(log_p.clone(), top_p, denoising.WHOLE)
            for chosen, kept in found:
                assert np.array_equal(chosen, expected_top_k(log_p, k).numpy())
                np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-6)


def test_faults(ranks: WorkerGroups, subtests: pytest.Subtests):
    """Claim: a logit that is not finite in one rank's columns is reported on every rank."""
    cases = list(product(FAULT, (np.nan, np.inf, -np.inf), (0, REAL - 1)))
    arguments = [arguments_of(poisoned(*case), "forward_kl") for case in cases]
    results = ranks(2).run_each(jobs.divergence_over_shards, arguments, layout=TP2)
    for case, found in zip(cases, results, strict=True):
        with subtests.test(case=case):
            for of_rank in found:
                assert of_rank["faults"].tolist() == [FAULT[case[0]]] * 7


def poisoned(whose: str, number: float, column: int) -> Inputs:
    """Inputs of which a model's output weight has one number that is not finite."""
    inputs = make_inputs(7, 1.0, torch.float32)
    hidden = inputs.student.detach() if whose == "student" else inputs.teacher
    weight = inputs.student_weight.detach() if whose == "student" else inputs.teacher_weight
    hidden.abs_()  # so that an infinite weight makes a logit of its own sign
    weight[column, 1] = number
    return inputs


def test_draws(ranks: WorkerGroups, subtests: pytest.Subtests):
    """Claim: every rank draws the token that one process draws from all logits, ties and forbidden
    columns included, and finds its margin."""
    logits, uniform = drawing_cases()
    given = {"logits": logits.numpy(), "uniform": uniform.numpy()}
    results = ranks(2).run_each(jobs.draw_over_shards, SHAPINGS, layout=TP2, **given)
    for shaping, found in zip(SHAPINGS, results, strict=True):
        with subtests.test(shaping=shaping):
            expected = denoising.draw(logits, uniform, **shaping)
            best = logits.sort(descending=True).values
            for token, confidence, entropy, margin in found:
                assert np.array_equal(margin, (best[:, 0].double() - best[:, 1]).numpy())
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
