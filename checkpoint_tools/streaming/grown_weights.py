"""Hugging Face weights with one row more: a mask token for a vocabulary that is full.

The row is the mean of the rows that are there, in the embedding and in an untied output layer: the
model reads it as no token in particular, and gives it no more probability than the average one.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from megatron_opdlm.model_files.safetensors_dir import EMBEDDING, HEAD, HFWeights

_ROWS = 4096  # summed at a time


class GrownWeights(HFWeights):
    """The weights of another, whose vocabulary has a row behind its last."""

    added_rows = 1

    @classmethod
    def of(cls, weights: HFWeights) -> Self:
        shape = replace(weights.model_shape, vocab_size=weights.model_shape.vocab_size + 1)
        return cls(weights.directory, shape, weights.entries)

    def get(self, name: str) -> Tensor:
        """One whole tensor, as stored but for the row."""
        if name not in (EMBEDDING, HEAD):
            return super().get(name)
        return torch.cat([super().get(name), self._mean_row(name)])

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows ``first`` to ``stop``, the new one included."""
        if name not in (EMBEDDING, HEAD) or stop < self.model_shape.vocab_size:
            return super().rows(name, first, stop)
        return torch.cat([super().rows(name, first, stop - 1), self._mean_row(name)])

    def _mean_row(self, name: str) -> Tensor:
        """[1, H], summed in float64, rounded to the stored type."""
        stored = super().get(name)
        total = sum(part.double().sum(0, keepdim=True) for part in stored.split(_ROWS))
        assert isinstance(total, Tensor)
        return (total / len(stored)).to(stored.dtype)
