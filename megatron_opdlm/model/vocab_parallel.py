"""The output layer on chosen positions, its vocabulary split over tensor-parallel ranks. Full
logits are never gathered.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.diffusion.denoising import WholeVocabulary
from megatron_opdlm.diffusion.wide_product import wide_product
from megatron_opdlm.hardware import Product


class VocabularyShard(WholeVocabulary):
    """This rank's columns of the vocabulary and the reductions over all of them.

    None of the reductions is differentiated: the divergence writes its own gradient, the sampler
    has none.
    """

    def __init__(self, columns: int, vocab_size: int) -> None:
        """``columns`` per rank, rows that parallel layouts pad on included; ``vocab_size`` of the
        Hugging Face config.
        """
        self.group = parallel.tensor_group()
        self.ranks = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.columns = columns
        self.start = self.rank * columns
        self.vocab_size = vocab_size

    def max(self, x: Tensor) -> Tensor:
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def min(self, x: Tensor) -> Tensor:
        return self._all_reduce(x, dist.ReduceOp.MIN)

    def sum(self, x: Tensor) -> Tensor:
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.ranks == 1:
            return super().before(x)
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        running = torch.stack([torch.zeros_like(x), *parts]).cumsum(
            0
        )  # the same order of additions on every rank
        return running[self.rank], running[-1]

    def gather_rows(self, x: Tensor) -> Tensor:
        """Concatenate x [M, k] of all ranks along the last dimension."""
        if self.ranks == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def columns_of(self, ids: Sequence[int], device: torch.device) -> Tensor:
        """Local columns of those global ids that this shard holds."""
        local = [i - self.start for i in ids if 0 <= i - self.start < self.columns]
        return torch.tensor(local, dtype=torch.int64, device=device)

    def padding(self, device: torch.device) -> Tensor | None:
        """bool [columns], True for rows that only pad the layout; None where there are none."""
        real = self.vocab_size - self.start
        if real >= self.columns:
            return None
        return torch.arange(self.columns, device=device) >= real

    def _all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.ranks > 1:
            x = x.contiguous().clone()
            dist.all_reduce(x, op=operation, group=self.group)
        return x


def select_positions(hidden: Tensor, index_M: Tensor, *, sequence_parallel: bool) -> Tensor:
    """The model's output under a plan that reads ``index_M`` -> hidden states [M, H] there.

    Without sequence parallelism the last layer has selected them already ([M, 1, H]); with it every
    rank holds its N / TP of all rows, which are gathered first.

    Gradient: each tensor rank's gradient of the result is partial (its columns of the vocabulary);
    the backward of the region function sums it over the ranks (and scatters it back under sequence
    parallelism).
    """
    if not sequence_parallel:
        return copy_to_tensor_model_parallel_region(hidden).flatten(0, 1)
    hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return hidden.flatten(0, 1).index_select(0, index_M)


def project(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    shard: VocabularyShard,
    forbidden_columns: Tensor | None = None,
    product: Product | None = None,
) -> Tensor:
    """This rank's logits [M, columns] in float32 at least, -inf in the rows that pad the layout and
    in the local ``forbidden_columns``. ``product``: with the weight, where it is laid out.
    """
    if product is None:
        logits = wide_product(hidden_MH, weight_VH.t())
    else:
        logits = product(hidden_MH)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    padding = shard.padding(logits.device)
    if padding is not None:
        logits = logits.masked_fill(padding, -torch.inf)
    if forbidden_columns is not None:
        logits[:, forbidden_columns] = -torch.inf
    return logits
