"""What of a model's modules reaches a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opdlm.checkpoint import load_weights, save_weights
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.moe.experts import SequentialMLP


@torch.no_grad()
def test_experts_with_extra_states(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Claim: a mixture of experts whose modules have the extra states of Transformer Engine's is
    saved and loaded, weight for weight; checkpoints hold no objects.

    Transformer Engine is not here, so the names are put where Megatron's TEGroupedLinear puts them
    (megatron/core/extensions/transformer_engine.py, ``_sharded_state_dict_grouped``):
    ``f"{prefix}_extra_state{'' if gemm_idx == 0 else gemm_idx}"``, an object for each expert."""
    original = SequentialMLP.sharded_state_dict

    def with_extra_states(self: Any, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        state = original(self, prefix, *args, **kwargs)
        for linear in ("linear_fc1", "linear_fc2"):
            for number in range(self.num_local_experts):
                name = f"{prefix}{linear}._extra_state{number or ''}"
                state[name] = ShardedObject(name, b"scales", (1,), (0,), replica_id=(0, 0, 0))
        return state

    monkeypatch.setattr(SequentialMLP, "sharded_state_dict", with_extra_states)
    model = jobs.load(Layout(), models.experts("student"))
    expected = {name: value.clone() for name, value in model.named_parameters()}
    save_weights(model, tmp_path / "weights")
    for parameter in model.parameters():
        parameter.zero_()
    load_weights(model, tmp_path / "weights")
    for name, value in model.named_parameters():
        assert torch.equal(value, expected[name]), name
