"""Law 1: HF logits = GPTModel logits (max abs 1e-4), tied and untied, on every layout. That import
and export give every tensor back bit for bit is in tests/parity/test_export.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_tools.streaming.megatron_weights import read_weights
from megatron_opdlm.model_files.manifest import write_manifest
from megatron_opdlm.model_files.names import hf_from_megatron
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from tests import oracle
from tests.conftest import VOCABULARY, TinyModels
from tests.distributed import conversion, jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.workers import WorkerGroups

LENGTHS = (7, 12, 1, 5)  # packed; 25 tokens: sequence parallelism pads the row


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.no_grad()
def expected_logits(hf_dir: Path) -> np.ndarray:
    model = oracle.load(hf_dir)
    return torch.cat([oracle.causal_logits(model, ids) for ids in sequences()]).numpy()


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    assert expected.shape == (sum(LENGTHS), VOCABULARY) == found.shape
    assert expected.std() > 1, "logits near zero would agree whatever the weights"
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["hf", "imported"])
def test_logits_equal_hugging_face_on_one_rank(models: TinyModels, kind: str, tied: bool):
    """Claim: packed causal logits = transformers' Qwen3, read from either kind of directory."""
    model_dir = getattr(models, kind)("student", tied=tied)
    found = jobs.causal_logits(Layout(), model_dir, sequences())
    assert found is not None
    assert_same_logits(found, expected_logits(models.hf("student", tied=tied)))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["tp2", "pp2", "tp2-sp", "tp2-pp2", "tp2-pp2-sp"])
def test_logits_equal_hugging_face_on_layouts(
    models: TinyModels, ranks: WorkerGroups, name: str, tied: bool
):
    """Claim: splitting tensors, layers and the sequence changes no logit; every rank of the last
    stage gets all of them."""
    number, layout = LAYOUTS[name]
    results = ranks(number).run(
        jobs.causal_logits,
        layout=layout,
        model_dir=models.imported("student", tied=tied),
        sequences=sequences(),
    )
    expected = expected_logits(models.hf("student", tied=tied))
    last_stage = [found for found in results if found is not None]
    assert len(last_stage) == number // layout.pipeline
    for found in last_stage:
        assert_same_logits(found, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "pp2", "tp2-pp2"])
def test_weights_of_any_layout_are_read(
    models: TinyModels, ranks: WorkerGroups, tmp_path: Path, name: str
) -> None:
    """Claim: an export reads what any layout saved, bit for bit: tensor ranks hold rows or columns,
    the vocabulary is padded by a row, stages hold layers."""
    hf = models.hf("student", tied=False)
    number, layout = LAYOUTS[name]
    directory = tmp_path / "weights"
    ranks(number).run(conversion.save_on, layout=layout, model_dir=hf, directory=directory)
    write_manifest(tmp_path, kind="model", dtype="fp32", block_contract=conversion.CONTRACT)
    shape = read_shape(hf)
    with open_weights(hf) as expected:
        found = dict(hf_from_megatron(shape, read_weights(tmp_path, shape)))
        assert found.keys() == set(expected.names())
        for tensor_name, tensor in found.items():
            assert torch.equal(tensor, expected.get(tensor_name)), tensor_name


@pytest.mark.distributed
def test_a_failing_rank_ends_the_import(
    models: TinyModels, ranks: WorkerGroups, tmp_path: Path
) -> None:
    """Claim: the rank raises its own error, the other one names it, and nothing is left."""
    hf = models.hf("student", tied=False)
    told = ranks(2).run(conversion.fail_on_last_rank, hf=hf, checkpoint=tmp_path / "checkpoint")
    assert told[1] == "OSError: [Errno 28] No space left on device"
    assert told[0].startswith("RunError: rank 1 failed")
    assert "No space left" in told[0]
    assert list(tmp_path.iterdir()) == []
