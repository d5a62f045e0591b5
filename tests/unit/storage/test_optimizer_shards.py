"""A run of a flattened tensor is cut into boxes of the tensor, all of it and in order."""

import itertools
import math

import pytest
import torch

from megatron_opdlm.storage.optimizer_shards import boxes


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (5, 1), (1, 6), (2, 3, 4)])
def test_boxes_are_the_run(shape: tuple[int, ...]):
    """Claim: for every run of every shape the boxes, read one after the other, are the run; there
    is none of no size, and at most two that are no whole rows on each axis but the last."""
    size = math.prod(shape)
    tensor = torch.arange(size).view(shape)
    for start, stop in itertools.combinations(range(size + 1), 2):
        found = list(boxes(start, stop, shape))
        parts = []
        for begin, extent in found:
            places = tuple(slice(b, b + e) for b, e in zip(begin, extent, strict=True))
            assert tensor[places].shape == extent and math.prod(extent) > 0
            parts.append(tensor[places].flatten())
        assert torch.equal(torch.cat(parts), torch.arange(start, stop))
        assert len(found) <= 1 + 2 * max(0, len(shape) - 1)
    assert not list(boxes(0, 0, shape))
