"""Claims: what ``model.recompute`` names is not kept for the backward pass, costs its forward once
more, and is left alone while decoding. That gradients stay the same is tested by
tests/distributed/test_layout_invariance.py, test_lora.py and test_moe.py.
"""

from typing import get_args

import pytest
import torch
from torch import Tensor

from megatron_opdlm.configuration.models import Recompute
from megatron_opdlm.model.attention_plan import causal_plan
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from megatron_opdlm.reporting import accounting
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.unit.model.test_row_split import PACKING, SHAPE, of_rank, rows


def kept_bytes(model: LanguageModel) -> int:
    """What the forward of a row of 40 tokens keeps, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.arange(40)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model.run(tokens, tokens, causal_plan([40], 40, torch.device("cpu")))
    output.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_less_is_kept_and_decoding_is_left_alone(models: TinyModels, experts: bool):
    hardware = jobs.join(Layout())
    model_dir = models.experts("student") if experts else models.hf("student", tied=False, layers=2)
    shape, kept = read_shape(model_dir), {}
    for recompute in get_args(Recompute):
        model = build_model(shape, Layout(), torch.float32, hardware, recompute=recompute)
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        kept[recompute] = kept_bytes(model)
        if recompute == "mlp":
            for mode in (True, False, True):
                layers = [layer.train(mode) for layer in model.decoder.layers]
                flags = [
                    getattr(layer.mlp, "moe_layer_recompute", layer.recompute_mlp)
                    for layer in layers
                ]
                assert flags == [mode, mode]
    assert kept["true"] < kept["mlp"] < 0.8 * kept["false"]
    assert kept["attention"] < kept["false"]


def test_operations_of_what_is_recomputed():
    """By hand: products of the MLP in every layer at every token, in the last one where it is read;
    of queries, keys and values of every pair."""
    (batch,) = rows(of_rank(0, 1, PACKING))[:1]
    found = {
        recompute: accounting.student_flops(
            SHAPE, batch, recompute=recompute, sequence_parallel=False
        )
        for recompute in get_args(Recompute)
    }
    tokens, read = len(batch.student_tokens), len(batch.labels)
    mlp = 2 * 3 * SHAPE.hidden * SHAPE.ffn * ((SHAPE.layers - 1) * tokens + read)
    assert found["mlp"] - found["false"] == pytest.approx(mlp)
    assert 0 < found["attention"] - found["false"] < found["true"] - found["false"]
    forward = (found["false"] - 3 * accounting.projection_flops(SHAPE, read)) / 3
    assert found["true"] - found["false"] == pytest.approx(forward)
