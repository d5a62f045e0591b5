"""Keys and values of the sequences being decoded, in pages of equal size that any slot can hold.

A position may be written many times: denoising passes overwrite the keys and values of their block
until the block's final tokens have been through the model. Attention hides what lies beyond the
query's block, so stale entries never count.
"""

import torch
from torch import Tensor


class KVCache:
    """Pages of one pipeline stage: keys and values [layers, pages, page_tokens, groups, head_dim].

    The *place* of a position is page * page_tokens + its offset in the page.
    """

    def __init__(
        self,
        *,
        layer_numbers: range,
        pages: int,
        page_tokens: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``layer_numbers`` are Megatron's global, 1-based numbers of this stage's layers."""
        shape = (len(layer_numbers), pages, page_tokens, groups, head_dim)
        self.pages, self.page_tokens, self.dtype, self.device = pages, page_tokens, dtype, device
        self._first_layer = layer_numbers.start
        # Zeros rather than garbage: hidden positions are multiplied by probability 0, and 0 * nan
        # is nan.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer_number: int, place_N: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values [N, groups, head_dim] of N new tokens at their places."""
        keys, values = self.layer(layer_number)
        keys.flatten(0, 1).index_copy_(0, place_N, key)
        values.flatten(0, 1).index_copy_(0, place_N, value)

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """All keys and values [pages, page_tokens, groups, head_dim] of a layer, in place."""
        layer = layer_number - self._first_layer
        return self._keys[layer], self._values[layer]

    def read(
        self, layer_number: int, pages: Tensor | slice, positions: int
    ) -> tuple[Tensor, Tensor]:
        """The first ``positions`` keys and values [n, positions, groups, head_dim] of pages that
        hold a whole slot each; of a slice without a copy.
        """
        keys, values = self.layer(layer_number)
        return keys[:, :positions][pages], values[:, :positions][pages]

    def copy(self) -> "KVCache":
        """An independent cache with the same content."""
        twin = object.__new__(KVCache)
        vars(twin).update(vars(self))
        twin._keys, twin._values = self._keys.clone(), self._values.clone()
        return twin
