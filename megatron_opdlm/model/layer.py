"""Megatron's transformer layer, whose last one carries only the rows on that somebody reads."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

_OF_EXPERTS = "moe_layer_recompute"  # an attribute of Megatron's mixture of experts


class ReadingLayer(TransformerLayer):
    """In the last layer, output projection, residual and MLP run at ``AttentionPlan.read`` only.

    Nothing after the last layer's attention mixes positions, so the rows that are read do not
    change; the others would be thrown away.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add = self.self_attn_bda
        self._wanted: Tensor | None = None
        self.self_attn_bda = self._add_residual
        self._recomputes = self.recompute_mlp, getattr(self.mlp, _OF_EXPERTS, False)

    def train(self, mode: bool = True) -> "ReadingLayer":
        """Recomputing the MLP is for training only: Megatron would also do it while decoding, where
        what it asks of the random generators cannot be captured.
        """
        self.recompute_mlp, of_experts = (mode and wanted for wanted in self._recomputes)
        if hasattr(self.mlp, _OF_EXPERTS):
            setattr(self.mlp, _OF_EXPERTS, of_experts)
        super().train(mode)
        return self

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = kwargs["packed_seq_params"]
        self._wanted = plan.rows_after(self.layer_number, self.config)
        return super()._forward_attention(hidden_states, *args, **kwargs)

    def _add_residual(self, training: bool, fused: bool) -> Any:
        """Megatron's bias-dropout-add on the rows that the attention returned."""
        add = self._add(training, fused)
        wanted, self._wanted = self._wanted, None

        def residual_of_wanted(output: Any, residual: Tensor, dropout: float) -> Tensor:
            rows = residual if wanted is None else residual.index_select(0, wanted)
            return add(output, rows, dropout)

        return residual_of_wanted
