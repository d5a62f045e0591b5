"""How a rollout's requests are shared out over the model replicas."""

import random

import pytest

from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.records import Prompt
from megatron_opdlm.slots import Request, split_over_replicas

RULES = Decoding(block_size=4, denoising_steps=4)


def made(lengths: list[tuple[int, int]]) -> list[Request]:
    return [
        Request(sample=i, prompt=Prompt(index=i, ids=[1] * prompt), max_new_tokens=response)
        for i, (prompt, response) in enumerate(lengths)
    ]


def work(request: Request) -> int:
    """Tokens through the model with blocks of four in four passes and one commit."""
    return len(request.prompt.ids) + 5 * request.max_new_tokens


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_work_is_balanced_and_complete(replicas: int):
    """Claim: every request has one replica, and the most loaded replica carries at most one
    request's work more than the least loaded one, whatever the spread of the limits."""
    draw = random.Random(replicas)
    requests = made([(draw.randint(1, 90), round(8 * 50 ** draw.random())) for _ in range(61)])
    shares = split_over_replicas(requests, replicas, RULES)
    assert sorted(i for share in shares for i in share) == list(range(61))
    loads = [sum(work(requests[i]) for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(work(request) for request in requests)
    # sorted by limit and dealt out in turn, as one would first, the long ones meet on one replica
    if replicas > 1:
        ideal = sum(loads) / replicas
        assert max(loads) < 1.05 * ideal


def test_a_replica_without_work():
    """Claim: fewer requests than replicas is legal."""
    assert split_over_replicas(made([(3, 4)]), 3, RULES) == [[0], [], []]


def test_limits_by_domain_are_what_is_balanced():
    """Claim: two long and two short responses go one of each to two replicas, although dealing
    them out in turn would put both long ones together."""
    shares = split_over_replicas(made([(5, 400), (5, 10), (5, 400), (5, 10)]), 2, RULES)
    assert [sorted(i % 2 for i in share) for share in shares] == [[0, 1], [0, 1]]
