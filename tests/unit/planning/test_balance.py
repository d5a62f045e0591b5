"""Sharing out loses nothing and is as even as it claims."""

import random

import pytest

from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.planning.balance import fill_bins, share_out, share_out_alike
from megatron_opdlm.records import State
from megatron_opdlm.reporting.accounting import state_cost


def spread(count: int, seed: int = 0) -> list[int]:
    """Lengths over two orders of magnitude."""
    draw = random.Random(seed)
    return [round(20 * 200 ** draw.random()) for _ in range(count)]


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_sharing_out_loses_none_and_balances(parts: int):
    """Claim: every item has exactly one part, in rising order, and no part has more work than the
    lightest and one item."""
    costs = spread(41)
    shares = share_out(costs, parts)
    assert len(shares) == parts
    assert sorted(item for share in shares for item in share) == list(range(41))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize("capacity", [1, 60, 700, 4000, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_bins_lose_none_and_keep_the_capacity(capacity: int, seed: int):
    """Claim: every item is in exactly one bin, only an item that alone exceeds the capacity may,
    and there are at most 11/9 of the bins that the total needs, and one."""
    sizes = spread(41, seed)
    bins = fill_bins(sizes, capacity)
    assert sorted(item for one in bins for item in one) == list(range(41))
    assert all(len(one) == 1 or sum(sizes[i] for i in one) <= capacity for one in bins)
    needed = sum(min(size, capacity) for size in sizes) / capacity
    if capacity >= 2 * max(sizes):
        assert len(bins) <= 11 / 9 * needed + 1


def test_bins_are_even_where_that_fits():
    """Claim: the last bin is no leftover: 5 items of 3 in bins of 10 are 3 and 2, and of 9 and 1
    the same number of bins with the smallest largest one."""
    assert sorted(len(one) for one in fill_bins([3] * 5, 10)) == [2, 3]
    assert sorted(sum([4, 4, 4, 4][i] for i in one) for one in fill_bins([4] * 4, 12)) == [8, 8]
    assert fill_bins([], 10) == [[]]
    assert fill_bins([25, 5], 10) == [[0], [1]]


def test_replicas_get_equal_work_and_about_as_many_microbatches():
    """Claim: over 8 replicas the operations differ by a few percent, although lengths differ 200
    times and the longest sequences are dominated by attention; the numbers of microbatches differ
    by two at most."""
    shape = ModelShape(28, 1024, 16, 8, 128, 3072, 151936, True, 1e6, 1e-6, 40960)
    states = [
        State(
            sample=i,
            prompt_ids=[1] * 100,
            response_ids=[1] * n,
            masked=[True] * n,
            counted=[True] * n,
            trained_tokens=n,
        )
        for i, n in enumerate(spread(128))
    ]
    tokens = [100 + 2 * len(state.response_ids) for state in states]
    costs = [state_cost(shape, shape, s, n) for s, n in zip(states, tokens, strict=True)]
    longest = max(range(128), key=lambda i: tokens[i])
    shortest = min(range(128), key=lambda i: tokens[i])
    assert costs[longest] / costs[shortest] > 1.1 * tokens[longest] / tokens[shortest]
    shares = share_out(costs, 8)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) < 1.02 * min(loads)
    counts = [len(fill_bins([tokens[i] for i in share], 16384)) for share in shares]
    assert max(counts) - min(counts) <= 2


def test_alike_items_stay_together_while_that_is_cheaper():
    """Claim: responses to one prompt share a part where that costs the dearest part less, and are
    shared out one by one where it would cost more."""
    alike = ["a", "b", "a", "b", "c", "c"]
    assert share_out_alike([3.0] * 6, alike, [1.0] * 6, 3) == [[0, 2], [1, 3], [4, 5]]
    assert share_out_alike([3.0] * 4, "aaaa", [1.0] * 4, 4) == [[0], [1], [2], [3]]
    assert share_out_alike([3.0, 3.0, 3.0, 9.0], "aaab", [0.0] * 4, 2) == [[0, 1, 2], [3]]
