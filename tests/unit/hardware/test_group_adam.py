"""Our Adam against PyTorch's."""

import pytest
import torch

from megatron_opdlm.hardware import group_adam

SIZES = (3, 5, 21, 8, 0, 1, 7)  # beside a piece of 8 numbers: small ones together, a large one cut


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_group_adam_is_adam(monkeypatch: pytest.MonkeyPatch, decay: float, decoupled: bool):
    """Claim: however parameters are cut and put together, every one gets PyTorch's update; one
    without a gradient keeps its value."""
    monkeypatch.setattr(group_adam, "PIECE", 8)
    torch.manual_seed(0)
    ours = [torch.randn(size, dtype=torch.float64) for size in (*SIZES, 4)]
    theirs = [value.clone() for value in ours]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": decay}
    own = group_adam.GroupAdam(ours, adam_w_mode=decoupled, **options)
    reference = kind(theirs, **options)
    for _ in range(4):
        for one, other in zip(ours[:-1], theirs, strict=False):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        own.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_what_is_updated_together(monkeypatch: pytest.MonkeyPatch):
    """Claim: at most PIECE numbers at a time, in order, every one once."""
    monkeypatch.setattr(group_adam, "PIECE", 8)
    numbers = torch.arange(sum(SIZES)).split(SIZES)
    batches = [
        [piece[0] for piece in one] for one in group_adam._batches((n,) * 4 for n in numbers)
    ]
    assert all(0 < sum(map(len, batch)) <= 8 for batch in batches)
    assert torch.cat([piece for batch in batches for piece in batch]).tolist() == list(range(45))
