"""Who sees whom in a packed row, before any kernel has made a mask of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion.masks import (
    block_causal_visible,
    branch_visible,
    two_stream_visible,
)


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """A row of N tokens: sequences one after the other, then a tail that belongs to none and that
    nobody reads. The tail may attend to anything but must not be seen.
    """

    lengths: tuple[int, ...]  # tokens of each sequence; their sum may be below N
    tokens: int  # N
    device: torch.device  # of the attention; the tensors below are on the host
    # Two-stream rows: absolute position // B [N], and False in the noisy copy [N]. None: causal.
    block: Tensor | None = None
    clean: Tensor | None = None
    branch: Tensor | None = None  # [N] of trees (packing/prefix_trees.py); None: there are none

    @property
    def causal(self) -> bool:
        """True for the teacher's mask, False for the student's."""
        return self.block is None

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Visibility between places of one sequence, on the host, for indices that broadcast."""
        if self.block is None or self.clean is None:
            return block_causal_visible(query, key, 1)
        block, clean, branch = self.block, self.clean, self.branch
        visible = two_stream_visible(block[query], clean[query], block[key], clean[key])
        return visible if branch is None else visible & branch_visible(branch[query], branch[key])

    def documents(self, size: int) -> Tensor:
        """Number of each token's sequence [size], on the host. What lies beyond the sequences gets
        numbers of its own, so that every token sees itself and no other sees it.
        """
        number = -1 - torch.arange(size)
        lengths = torch.tensor(self.lengths)
        number[: int(lengths.sum())] = torch.repeat_interleave(lengths)
        return number
