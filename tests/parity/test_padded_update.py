"""The training benchmark's baseline computes our loss and gradients; else the ratio would compare
two tasks.
"""

from dataclasses import replace

import pytest

from benchmarks.padded_update import PaddedUpdate
from benchmarks.train_step import SIZES, make_states
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import hf_names, read_shape
from megatron_opdlm.states import make_state
from tests import oracle
from tests.conftest import END_IDS, MASK, TinyModels
from tests.recorded import GRADIENT_TOLERANCE, LOSS_TOLERANCE, PLAIN, Recorded, distance, length
from tests.tiny_requests import IDS


@pytest.fixture(scope="module")
def recorded(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(models, tmp_path_factory.mktemp("recorded"))


def test_baseline_is_the_expected_update(models: TinyModels, recorded: Recorded):
    """Claim: loss and gradients over prompts of every length modulo B, sequences without loss, that
    end at once, in mid-block and never are the oracle's, which ours are held to elsewhere."""
    weights = {}
    for role in ("student", "teacher"):
        directory = models.hf(role, tied=PLAIN.tied)
        shape = read_shape(directory)
        with open_weights(directory) as tensors:
            weights[role] = {name: tensors.get(name) for name in hf_names(shape)}
    baseline = PaddedUpdate(
        shape, **weights, block_size=PLAIN.block_size, mask_id=MASK, lr=1e-3, clip_grad=1.0
    )
    states = [
        make_state(
            number,
            row["prompt_ids"],
            row["response_ids"],
            [bool(m) for m in row["masked"]],
            replace(IDS, end_ids=END_IDS),
            exclude_eos=False,
        )
        for number, row in enumerate(recorded.rows(PLAIN))
    ]
    expected = recorded.expected(PLAIN)
    assert baseline.accumulate(states) == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE)
    gradients = {name: g.numpy() for name, g in oracle.gradients(baseline.student).items()}
    difference = distance(gradients, expected["gradients"])
    assert difference < GRADIENT_TOLERANCE * length(expected["gradients"])


def test_the_benchmarks_states():
    """Claim: whole blocks, one state a sequence, lengths spread as the benchmark says."""
    case = SIZES["tiny"]
    states = make_states(8, case)
    lengths = sorted(len(state.response_ids) for state in states)
    assert len(states) == 8 and lengths[-1] == pytest.approx(
        SIZES["tiny"].spread * lengths[0], rel=0.3
    )
    assert all((len(s.prompt_ids) + len(s.response_ids)) % 4 == 0 for s in states)
