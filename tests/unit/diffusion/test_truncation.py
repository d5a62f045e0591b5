"""Which entries a truncated distribution keeps: an exact choice, ties included, decided here by
sorting. (Over tensor ranks: tests/distributed/test_vocabulary_parallel.py.)
"""

import pytest
import torch
from torch import Tensor

from megatron_opdlm.diffusion import truncation
from megatron_opdlm.diffusion.denoising import WHOLE
from tests import oracle

COUNTS = [1, 2, 3, 6, 12, 13, 14, 10**9]
MASSES = [1e-9, 0.3, 0.6, 0.95]


def distributions() -> Tensor:
    """Log-probabilities [M, V]: smooth, with many ties, all equal, and nearly certain."""
    generator = torch.Generator().manual_seed(4)
    smooth = torch.randn(10, 13, generator=generator) * 2
    tied = torch.randint(-2, 3, (20, 13), generator=generator).float()
    peaked = torch.randn(5, 13, generator=generator) * 200
    return torch.cat([smooth, tied, torch.zeros(2, 13), peaked]).log_softmax(-1)


def expected_top_k(log_p: Tensor, k: int) -> Tensor:
    """bool [M, V] by sorting, ties to the lowest id."""
    chosen = torch.zeros_like(log_p, dtype=torch.bool)
    for row, values in enumerate(log_p.tolist()):
        chosen[row, sorted(range(len(values)), key=lambda v: (-values[v], v))[:k]] = True
    return chosen


def expected_nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Log-probabilities [M, V] of the renormalised nucleus, -inf outside it."""
    cut = torch.full_like(log_p, -torch.inf)
    for row, values in enumerate(log_p.double()):
        kept = oracle.nucleus(values, top_p)
        cut[row, kept] = (values[kept] - values[kept].logsumexp(-1)).float()
    return cut


@pytest.mark.parametrize("k", COUNTS)
def test_top_k(k: int):
    """Claim: exactly min(k, V) entries, the largest, ties to the lowest id."""
    found = truncation.top_k(distributions(), k, WHOLE)
    assert torch.equal(found, expected_top_k(distributions(), k))


@pytest.mark.parametrize("k", [2, 5, 13])
def test_top_k_of_a_nucleus_takes_nothing_from_outside(k: int):
    """Claim: where the target has fewer than k entries left, those are all that are taken."""
    log_p = truncation.nucleus(distributions(), 0.5, WHOLE)
    left = log_p > truncation.FLOOR
    found = truncation.top_k(log_p, k, WHOLE)
    assert torch.equal(found, expected_top_k(log_p, k) & left)
    assert bool((found.sum(-1) == left.sum(-1).clamp(max=k)).all())


@pytest.mark.parametrize("top_p", MASSES)
def test_nucleus(top_p: float):
    """Claim: the smallest set of likeliest entries that holds the mass, ties to the lowest id,
    renormalised; what is outside has probability 0."""
    found = truncation.nucleus(distributions(), top_p, WHOLE)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(
        found.masked_fill(found <= truncation.FLOOR, -torch.inf),
        expected_nucleus(distributions(), top_p),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_sum(dtype: torch.dtype):
    """Claim: exact also where every counted probability underflows, and where nothing counts."""
    log_x = torch.tensor([[-800.0, -801.0, 0.0], [-1.0, -2.0, -3.0]], dtype=dtype)
    left_out = torch.tensor([[False, False, True], [True, True, True]])
    found = truncation.log_sum(log_x, left_out, WHOLE)
    expected = torch.tensor([[-800.0, -801.0]], dtype=dtype).logsumexp(-1)
    torch.testing.assert_close(found[0], expected)
    assert float(found[1]) == pytest.approx(truncation.FLOOR)
