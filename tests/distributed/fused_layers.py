"""Layers put together as Transformer Engine's are, in plain PyTorch: norms inside the linears that
follow them, parameters under its names, an extra state in every module. They stand in for
Transformer Engine where it cannot run, so that everything around its layers can be tested: the
specification, names, gradients of split layers, checkpoints. Not its kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model.layer_spec import RMSNorm
from megatron_opdlm.run import build
from tests.distributed import jobs

# isort: split
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class _ExtraState:
    """What Transformer Engine keeps beside the weights: bytes that mean nothing in 16 bits."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None, "checkpoints hold no extra state"  # None: Megatron's linears'


class Norm(_ExtraState, RMSNorm):
    """Stands for ``TENorm``."""


class NormedColumns(_ExtraState, ColumnParallelLinear):
    """Stands for ``TELayerNormColumnParallelLinear``."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        ones = torch.ones(input_size, dtype=config.params_dtype)
        self.layer_norm_weight = torch.nn.Parameter(ones)
        vars(self.layer_norm_weight)["sequence_parallel"] = config.sequence_parallel

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel.tensor_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class Rows(_ExtraState, RowParallelLinear):
    """Stands for ``TERowParallelLinear``."""


class FusedProvider(LocalSpecProvider):
    """Stands for ``TESpecProvider``."""

    def row_parallel_linear(self) -> type:
        return Rows

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormedColumns

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm


@contextmanager
def fused_layers() -> Iterator[None]:
    """Every model is built from Megatron's Transformer Engine spec, with the layers above."""
    original = build.kernels_of
    specs: Any = gpt_layer_specs
    provider = getattr(specs, "TESpecProvider", None)
    specs.TESpecProvider = FusedProvider
    build.kernels_of = lambda config, hardware: (Kernels(spec="te"), Kernels(spec="te"))
    try:
        yield
    finally:
        specs.TESpecProvider = provider
        build.kernels_of = original


def train_fused(overrides: list[str]) -> None:
    """``jobs.train_run`` with fused layers."""
    with fused_layers():
        jobs.train_run(overrides)


def replay_fused(overrides: list[str], trajectories: Path) -> dict[str, Any]:
    """``jobs.replay_with_gradients`` with fused layers."""
    with fused_layers():
        return jobs.replay_with_gradients(overrides, trajectories)
