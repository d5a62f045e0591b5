"""Law 6 on the pure functions: which positions a pass commits, and how a token is drawn.

``tests/oracle.py`` decides the same by sorting in float64, position by position.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.draw import Counted
from megatron_opdlm.diffusion import denoising, randomness
from tests import oracle


def rules(block_size: int, steps: int, remasking: str, **options: Any) -> oracle.Rules:
    return oracle.Rules(
        block_size=block_size, steps=steps, remasking=remasking, mask_id=0, end_ids=(), **options
    )


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("block_size", range(1, 7))
def test_quota(block_size: int, steps: int):
    """Claim: B // T each, one more in the first B mod T passes, B in all; then whatever is
    left."""
    found = denoising.quota(torch.arange(steps + 2), block_size, steps).tolist()
    extra = block_size % steps
    expected = [block_size // steps + 1] * extra + [block_size // steps] * (steps - extra)
    assert found == [*expected, block_size, block_size]
    assert sum(expected) == block_size


# Few distinct values, so that ties are common.
SHARE = st.sampled_from([0.05, 0.2, 0.5, 0.5 + 2**-40, 0.75, 1.0])


@st.composite
def blocks(draw: Any) -> tuple[int, int, Tensor, Tensor, Tensor, Tensor]:
    size, count = draw(st.integers(1, 6)), draw(st.integers(1, 4))

    def table(values: Any) -> Tensor:
        row = st.lists(values, min_size=size, max_size=size)
        return torch.tensor(draw(st.lists(row, min_size=count, max_size=count)))

    steps = draw(st.integers(1, 7))
    passes = torch.tensor([draw(st.integers(0, steps + 1)) for _ in range(count)])
    return size, steps, table(SHARE).double(), table(SHARE).double(), table(st.booleans()), passes


@pytest.mark.parametrize("remasking", denoising.REMASKING)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=blocks())
def test_commits_are_those_of_the_definition(remasking: str, case: Any):
    """Claim: for every mixture of masked positions, passes and ties, each block of a batch commits
    what sorting it by itself commits: static exactly min(quota, masked), dynamic everything
    strictly above the threshold and at least the quota, ties to the lowest position."""
    size, steps, confidence, entropy, masked, passes = case
    found = denoising.choose_commits(
        confidence,
        entropy,
        masked,
        passes,
        steps=steps,
        remasking=remasking,
        threshold=0.5,
        entropy_bound=0.6,
    )
    assert not bool((found & ~masked).any())
    ours = rules(size, steps, remasking, threshold=0.5, entropy_bound=0.6)
    for block in range(len(masked)):
        drawn = {
            i: oracle.Drawn(0, float(confidence[block, i]), float(entropy[block, i]))
            for i in range(size)
            if masked[block, i]
        }
        expected = oracle.committed(drawn, int(passes[block]), ours)
        assert torch.nonzero(found[block]).flatten().tolist() == sorted(expected)
        quota = int(denoising.quota(passes[block], size, steps))
        if remasking == "low_confidence_static":
            assert len(expected) == min(quota, len(drawn))
        if remasking == "low_confidence_dynamic":
            above = {i for i, d in drawn.items() if d.confidence > 0.5}
            assert above <= set(expected) and len(expected) >= min(quota, len(drawn))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_entropy_rule_holds_in_every_regular_pass(steps: int):
    """Claim: uncertain positions wait however few passes there are; only after T passes all go."""
    entropy = torch.tensor([[0.3, 0.2, 0.3, 9.0]], dtype=torch.float64)
    for pass_index, expected in [(steps - 1, [1]), (steps, [0, 1, 2, 3])]:
        found = denoising.choose_commits(
            torch.zeros_like(entropy),
            entropy,
            torch.ones(1, 4, dtype=torch.bool),
            torch.tensor([pass_index]),
            steps=steps,
            remasking="entropy_bounded",
            entropy_bound=0.5,
        )
        assert torch.nonzero(found[0]).flatten().tolist() == expected


SHAPINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_k": 99},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.55},
]


def drawing_cases() -> tuple[Tensor, Tensor]:
    """Logits [M, V] with ties, flat and peaked rows and forbidden ids; uniforms with the ends."""
    generator = torch.Generator().manual_seed(3)
    smooth = torch.randn(40, 13, generator=generator) * 2
    tied = torch.randint(-2, 3, (40, 13), generator=generator).float()
    flat = torch.zeros(4, 13)
    peaked = torch.full((4, 13), -10.0)
    peaked[:, 5] = 10.0
    logits = torch.cat([smooth, tied, flat, peaked])
    logits[:, [2, 12]] = -torch.inf
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    uniform[::7], uniform[3::7] = 0.0, 1 - 2.0**-48
    return logits, uniform


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_draw_inverts_the_shaped_distribution(shaping: dict[str, Any]):
    """Claim: token, confidence and entropy equal a float64 sort, ties to the lowest id, at every
    u from 0 to the largest below 1."""
    logits, uniform = drawing_cases()
    found = denoising.draw(logits, uniform, **shaping)
    for row, u in enumerate(uniform.tolist()):
        expected = oracle.draw(logits[row], rules(4, 4, "sequential", **shaping), u)
        assert int(found.token[row]) == expected.token
        assert float(found.confidence[row]) == pytest.approx(expected.confidence, rel=1e-6)
        assert float(found.entropy[row]) == pytest.approx(expected.entropy, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("at_once", [None, 600, 1])
def test_every_column_of_a_wide_row(at_once: int | None):
    """Claim: with equal weights u = n / N is the n-th of N columns and the number below u the one
    before it, whatever sums lie between and however many rows are at work; what is forbidden is
    never drawn."""
    logits = torch.zeros(700)
    logits[110:298] = -torch.inf  # all of some chunks, a part of others
    allowed = logits.isfinite().nonzero().flatten()
    assert len(allowed) == 512
    at = torch.arange(512, dtype=torch.float64) / 512
    uniform = torch.cat([at, at[1:] - 2.0**-50])
    found = denoising.draw(
        logits.expand(len(uniform), -1), uniform, temperature=0.7, numbers_at_once=at_once
    )
    assert torch.equal(found.token, torch.cat([allowed, allowed[:-1]]))
    torch.testing.assert_close(found.confidence, torch.full_like(uniform, 1 / 512))
    torch.testing.assert_close(found.entropy, torch.full_like(uniform, math.log(512)))


@pytest.mark.parametrize(
    ("shaping", "most"), [({"top_k": 20}, 2), ({"top_k": 20, "top_p": 0.9}, 2), ({"top_p": 0.9}, 6)]
)
def test_truncation_takes_few_reductions(shaping: dict[str, Any], most: int):
    """Claim: one for the candidates or, with top-p alone, five sums of a few numbers; one for the
    order of ties. The kept set of a real vocabulary's size is that of sorting."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 20_000, generator=generator).mul_(3).round_(decimals=1)  # with ties
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    plain, counted = Counted(), Counted()
    denoising.draw(logits, uniform, temperature=1.0, shard=plain)
    found = denoising.draw(logits, uniform, temperature=1.0, shard=counted, **shaping)
    assert counted.count - plain.count <= most
    for row, u in enumerate(uniform.tolist()):
        ours = rules(4, 4, "sequential", temperature=1.0, **shaping)
        assert int(found.token[row]) == oracle.draw(logits[row], ours, u).token


def chi_square(counts: Tensor, probability: Tensor) -> float:
    """Pearson's statistic over the ids that can be drawn, as standard deviations from its mean."""
    possible = probability > 0
    assert not counts[~possible].any()
    expected = probability[possible] * counts.sum()
    assert expected.min() > 5, "the approximation by a chi-square distribution needs more draws"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("shaping", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_frequencies_are_the_probabilities(shaping: dict[str, Any]):
    """Claim: with keyed uniforms, over samples and positions, tokens come with the frequencies of
    the shaped softmax (chi-square within 4 standard deviations)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(11, generator=generator)
    logits[4] = -torch.inf
    sample, position = torch.arange(200)[:, None], torch.arange(100)[None]
    uniform = randomness.uniform(5, 1, sample, position, 0, randomness.DRAW_TOKEN).flatten()
    rows = logits.expand(len(uniform), -1)
    drawn = denoising.draw(rows, uniform, temperature=1.0, **shaping).token
    order = logits.softmax(-1).sort(descending=True).indices
    mass = logits.softmax(-1)[order].cumsum(-1)
    kept = order[: shaping.get("top_k", 11)]
    if "top_p" in shaping:
        kept = order[: int((mass < shaping["top_p"]).sum()) + 1]
    probability = torch.zeros(11).index_put((kept,), logits.softmax(-1)[kept])
    counts = torch.bincount(drawn, minlength=11).float()
    assert abs(chi_square(counts, probability / probability.sum())) < 4


def test_uniforms_do_not_correlate_over_any_key():
    """Claim: numbers of neighbouring keys, in every place of the key, look independent."""
    values = randomness.uniform(
        torch.arange(9)[:, None, None, None],
        torch.arange(9)[:, None, None],
        torch.arange(9)[:, None],
        torch.arange(40),
    )
    assert values.dtype is torch.float64
    assert bool(((values >= 0) & (values < 1)).all())
    assert values.unique().numel() == values.numel()
    for axis in range(4):
        left = values.narrow(axis, 0, values.shape[axis] - 1).flatten()
        right = values.narrow(axis, 1, values.shape[axis] - 1).flatten()
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1]
        assert abs(float(correlation)) < 4 / len(left) ** 0.5
    for a, b in itertools.combinations([(1, 2, 3), (2, 1, 3), (3, 2, 1), (0, 1, 2, 3)], 2):
        assert float(randomness.uniform(*a)) != float(randomness.uniform(*b))


def test_a_number_is_the_same_alone_and_in_a_tensor():
    """Claim: broadcasting changes no bit, so batches cannot matter."""
    together = randomness.uniform(7, torch.arange(5)[:, None], torch.arange(6))
    for i, j in itertools.product(range(5), range(6)):
        assert torch.equal(randomness.uniform(7, i, j), together[i, j])
