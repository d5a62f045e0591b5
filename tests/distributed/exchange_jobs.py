"""Exchanges of a buffer among ranks, run on every rank of a group."""

from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_opdlm import parallel
from megatron_opdlm.hardware import buffer_exchange
from megatron_opdlm.parallel import Layout


def exchange(numbers: int, piece: int, dtype: torch.dtype) -> dict[str, bool]:
    """Whether our exchanges of a buffer of ``numbers`` a rank leave what gloo's leave."""
    parallel.init(Layout())
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    given = torch.randn(numbers * size, generator=torch.Generator().manual_seed(rank)).to(dtype)
    summed, gathered = torch.empty(numbers, dtype=dtype), torch.empty_like(given)
    dist.reduce_scatter_tensor(summed, given.clone())
    dist.all_gather_into_tensor(gathered, summed)
    buffer = given.clone()
    part = buffer.chunk(size)[rank]
    with patch.object(buffer_exchange, "PIECE", piece):
        buffer_exchange.reduce_scatter(part, buffer, group)
    close = torch.allclose(part, summed, rtol=0, atol=16 * torch.finfo(dtype).eps)  # order of sums
    part.copy_(summed)
    places = zip(buffer.chunk(size), given.chunk(size), strict=True)
    untouched = all(torch.equal(*pair) for other, pair in enumerate(places) if other != rank)
    buffer_exchange.all_gather(buffer, part, group)
    return {"sum": close, "others": untouched, "gathered": torch.equal(buffer, gathered)}
