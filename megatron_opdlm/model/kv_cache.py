"""Keys and values of the sequences being decoded, indexed by absolute position.

A position may be written many times: denoising passes overwrite the keys and values of their block
until the block's final tokens have been through the model. Attention hides what lies beyond the
query's block, so stale entries never count.
"""

import torch
from torch import Tensor


class KVCache:
    """Slots of one pipeline stage: keys and values [layers, slots, positions, groups, head_dim]."""

    def __init__(
        self,
        *,
        layer_numbers: range,
        slots: int,
        positions: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``layer_numbers`` are Megatron's global, 1-based numbers of this stage's layers."""
        shape = (len(layer_numbers), slots, positions, groups, head_dim)
        self.slots, self.dtype, self.device = slots, dtype, device
        self._first_layer = layer_numbers.start
        # Zeros rather than garbage: hidden positions are multiplied by probability 0, and 0 * nan
        # is nan.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def write(
        self, layer_number: int, slot_N: Tensor, position_N: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store keys and values [N, groups, head_dim] of N new tokens at their (slot, position)."""
        layer = layer_number - self._first_layer
        self._keys[layer, slot_N, position_N] = key
        self._values[layer, slot_N, position_N] = value

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """All keys and values [slots, positions, groups, head_dim] of a layer, in place."""
        layer = layer_number - self._first_layer
        return self._keys[layer], self._values[layer]

    def read(
        self, layer_number: int, slots: Tensor | slice, positions: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [n, positions, groups, head_dim] of the given slots; of a slice without a
        copy.
        """
        keys, values = self.layer(layer_number)
        return keys[:, :positions][slots], values[:, :positions][slots]

    def copy(self) -> "KVCache":
        """An independent cache with the same content."""
        twin = object.__new__(KVCache)
        vars(twin).update(vars(self))
        twin._keys, twin._values = self._keys.clone(), self._values.clone()
        return twin
