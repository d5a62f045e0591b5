"""What ranks of a CPU run send each other of Megatron's buffers, against gloo's own exchanges."""

import pytest
import torch

from tests.distributed import exchange_jobs as jobs
from tests.distributed.workers import WorkerGroups

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_leave_what_gloo_leaves(ranks: WorkerGroups, size: int):
    """Claim: in pieces or whole, every rank gets the sum of all ranks' parts in its own place, the
    other places stay, and gathering fills them with what the others have."""
    cases = [
        {"numbers": numbers, "piece": 64, "dtype": dtype}
        for numbers in (1, 64, 200)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for case, found in zip(cases, ranks(size).run_each(jobs.exchange, cases), strict=True):
        assert all(all(one.values()) for one in found), (case, found)
