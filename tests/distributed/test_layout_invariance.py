"""Law 3: one checkpoint, one recorded rollout: the same losses, gradients, updates and tokens on
every layout and in every packing. What is expected comes from transformers and PyTorch alone
(tests/oracle.py), so the one-rank run is tested like the others.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_opdlm.diffusion.decoding import Decoding
from tests.conftest import END_IDS, TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS, overrides
from tests.distributed.workers import WorkerGroups
from tests.recorded import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    MOVE_TOLERANCE,
    PLAIN,
    SHIFTED,
    WEIGHT_TOLERANCE,
    Case,
    Recorded,
    distance,
    length,
)
from tests.tiny_requests import IDS, request

LR, CLIP = 2e-3, 0.3
CASES = pytest.mark.parametrize("case", [PLAIN, SHIFTED], ids=lambda case: case.name)
EVERY_LAYOUT = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture(scope="module")
def recorded(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(models, tmp_path_factory.mktemp("recorded"))


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def assert_losses(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert relative(found["loss"], expected["loss"]) < LOSS_TOLERANCE
    assert relative(found["grad_norm"], expected["grad_norm"]) < LOSS_TOLERANCE
    np.testing.assert_allclose(
        found["per_sequence"], expected["per_sequence"], rtol=LOSS_TOLERANCE, atol=1e-6
    )


def assert_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert distance(found, expected) < GRADIENT_TOLERANCE * length(expected)
    for name, gradient in expected.items():  # a small tensor must not hide behind large ones
        difference = float(np.linalg.norm(found[name] - gradient))
        assert difference < 10 * GRADIENT_TOLERANCE * float(np.linalg.norm(gradient)), name


@CASES
def test_the_recorded_rollout_has_every_kind_of_sequence(recorded: Recorded, case: Case):
    """Claim (that the cases below are no empty ones): all residues, a sequence without loss, ends
    at once, in mid-block and never, an odd number of sequences."""
    rows, expected = recorded.rows(case), recorded.expected(case)
    ends = [
        next((i for i, t in enumerate(row["response_ids"]) if t in END_IDS), None) for row in rows
    ]
    assert {len(row["prompt_ids"]) % case.block_size for row in rows} == set(range(case.block_size))
    assert len(rows) % 2 == 1 and 0.0 in expected["per_sequence"]
    assert 0 in ends and None in ends
    assert any((len(r["prompt_ids"]) + len(r["response_ids"])) % case.block_size for r in rows)
    assert all(np.any(g) for g in expected["gradients"].values())


PACKINGS = [
    ["update.tokens_per_microbatch=1"],
    ["update.tokens_per_microbatch=90", "loss.chunk_rows=7"],
    ["update.tokens_per_microbatch=100000", "model.recompute=true"],
    ["update.tokens_per_microbatch=120", "model.recompute=mlp"],
    ["update.tokens_per_microbatch=130", "model.recompute=attention"],
]


@CASES
@pytest.mark.parametrize("keys", PACKINGS, ids=lambda keys: keys[0].partition("=")[2])
def test_one_rank_in_every_packing(recorded: Recorded, case: Case, keys: list[str]):
    """Claim: loss, gradient norm and every gradient are those of plain PyTorch on unpacked
    sequences, whether a microbatch holds one sequence, some or all."""
    found = jobs.replay_with_gradients([*recorded.overrides(case), *keys], recorded.file(case))
    expected = recorded.expected(case)
    assert_losses(found, expected)
    assert_gradients(found["gradients"], expected["gradients"])


@CASES
def test_order_of_sequences(recorded: Recorded, case: Case, tmp_path: Path):
    """Claim: reversing the file reverses the sequences' losses and changes nothing else."""
    path = tmp_path / "reversed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in recorded.rows(case)[::-1]))
    keys = [*recorded.overrides(case), "update.tokens_per_microbatch=120"]
    found = jobs.replay_with_gradients(keys, path)
    expected = recorded.expected(case)
    assert_losses(found, expected | {"per_sequence": expected["per_sequence"][::-1]})
    assert_gradients(found["gradients"], expected["gradients"])


@pytest.mark.distributed
@CASES
@EVERY_LAYOUT
def test_losses_and_gradients(recorded: Recorded, ranks: WorkerGroups, name: str, case: Case):
    """Claim: on every layout the loss and the gradient norm agree to 1e-5, all ranks report the
    same, and the gradients, put together from all ranks, agree to 1e-5 in norm."""
    number, layout = LAYOUTS[name]
    recompute = "true" if case is SHIFTED else "mlp" if "sp" in name else "false"
    keys = ["update.tokens_per_microbatch=110", f"model.recompute={recompute}"]
    results = ranks(number).run(
        jobs.replay_with_gradients,
        overrides=[*recorded.overrides(case), *overrides(layout), *keys],
        trajectories=recorded.file(case),
    )
    expected = recorded.expected(case)
    for found in results:
        assert_losses(found, expected)
        assert found["per_sequence"] == results[0]["per_sequence"]
        assert found["loss_tokens"] == results[0]["loss_tokens"]
    assert_gradients(results[0]["gradients"], expected["gradients"])


BF16 = ["model.dtype=bf16", "teacher.dtype=bf16"]


@CASES
def test_bf16_is_float32_rounded(recorded: Recorded, case: Case):
    """Claim: the 16-bit wrapper changes the precision and nothing else. bf16 keeps 8 bits of each
    number, 0.4 %; over four layers 3 % of the loss and 10 % of the gradients are left to it."""
    found = jobs.replay_with_gradients([*recorded.overrides(case), *BF16], recorded.file(case))
    expected = recorded.expected(case)
    assert relative(found["loss"], expected["loss"]) < 0.03
    assert relative(found["grad_norm"], expected["grad_norm"]) < 0.03
    off = distance(found["gradients"], expected["gradients"]) / length(expected["gradients"])
    assert 1e-3 < off < 0.1  # and it does change it


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2-sp", "pp2-dp2"])
def test_bf16_on_layouts(recorded: Recorded, ranks: WorkerGroups, name: str):
    """Claim: the same on layouts, where activations travel in bf16."""
    number, layout = LAYOUTS[name]
    keys = [*recorded.overrides(PLAIN), *BF16, *overrides(layout)]
    found, *_ = ranks(number).run(
        jobs.replay_with_gradients, overrides=keys, trajectories=recorded.file(PLAIN)
    )
    expected = recorded.expected(PLAIN)
    assert relative(found["loss"], expected["loss"]) < 0.03
    assert distance(found["gradients"], expected["gradients"]) < 0.1 * length(expected["gradients"])


def assert_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=WEIGHT_TOLERANCE)
    np.testing.assert_allclose(found["grad_norms"], expected["grad_norms"], rtol=WEIGHT_TOLERANCE)
    moved = distance(expected["weights"], expected["start"])
    difference = distance(found["weights"], expected["weights"])
    assert difference < WEIGHT_TOLERANCE * length(expected["weights"])
    assert difference < MOVE_TOLERANCE * moved


def training_arguments(recorded: Recorded, case: Case, keys: list[str]) -> dict[str, Any]:
    settings = [f"optimizer.clip_grad={CLIP}", "update.tokens_per_microbatch=150"]
    return {
        "overrides": [*recorded.overrides(case), *settings, *keys],
        "updates": [recorded.rows(case, seed) for seed in (1, 2, 3)],
        "lr": LR,
    }


@CASES
def test_three_updates_on_one_rank(recorded: Recorded, case: Case):
    """Claim: clipping, Adam and the learning rate are PyTorch's: weights after 3 updates agree to
    1e-4, and to 1e-3 of the distance that they moved."""
    found = jobs.train_on(**training_arguments(recorded, case, []))
    expected = recorded.expected_training(case, LR, CLIP)
    assert max(expected["grad_norms"]) > CLIP
    assert_training(found, expected)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, PLAIN) for name in LAYOUTS), ("tp2-pp2-sp", SHIFTED), ("pp2-dp2", SHIFTED)],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_three_updates(recorded: Recorded, ranks: WorkerGroups, name: str, case: Case):
    """Claim: the same on every layout; replicas and replicated weights stay equal bit for bit."""
    number, layout = LAYOUTS[name]
    results = ranks(number).run(
        jobs.train_on, **training_arguments(recorded, case, overrides(layout))
    )
    assert_training(results[0], recorded.expected_training(case, LR, CLIP))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["dp2", "cp2"])
def test_sums_that_overlap_the_backward_pass(recorded: Recorded, ranks: WorkerGroups, name: str):
    """Claim: gradients that are summed bucket by bucket while others are still computed, as on
    GPUs, make the same updates (the order of the sum in the gradient norm apart), also where a rank
    has no sequence in one of them. From the second update on Megatron itself asserts that every
    bucket's sum began in the backward pass, for which each weight needs a gradient on every
    rank."""
    number, layout = LAYOUTS[name]
    arguments = training_arguments(recorded, PLAIN, overrides(layout))
    arguments["updates"][1] = arguments["updates"][1][:1]
    (expected, *_), (found, *_) = (
        ranks(number).run(jobs.train_on, **arguments, overlapped=overlapped)
        for overlapped in (False, True)
    )
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-6)
    assert distance(found["weights"], expected["weights"]) < 1e-6 * length(expected["weights"])


DECODINGS = {
    "greedy": Decoding(block_size=4, denoising_steps=4),
    "drawn": Decoding(
        block_size=4,
        denoising_steps=3,
        remasking="low_confidence_dynamic",
        threshold=0.25,
        temperature=1.0,
        top_k=20,
        top_p=0.9,
    ),
    "drawn-shift": Decoding(
        block_size=3,
        denoising_steps=2,
        remasking="entropy_bounded",
        entropy_bound=3.0,
        temperature=0.8,
        logit_shift=True,
    ),
    "autoregressive": Decoding(mode="ar", temperature=1.0, top_p=0.9),
}


SMALL = ("tp2", "pp2", "dp2", "tp2-sp", "cp2")
LARGE = ("tp2-pp2", "tp2-dp2-sp", "pp2-cp2")  # four ranks on two cores: one decoding, else slow


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *product(SMALL, DECODINGS),
        *product(LARGE, ["drawn"]),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name, kind in product(LARGE, DECODINGS)
            if kind != "drawn"
        ),
    ],
)
def test_rollouts(models: TinyModels, ranks: WorkerGroups, name: str, kind: str):
    """Claim: trajectories (tokens, passes, counts) are identical on every layout and on each of
    its ranks, in any batch order and number of slots."""
    number, layout = LAYOUTS[name]
    model_dir = models.hf("student", tied=True, layers=2)
    asked = [request(i, 1 + (5 * i) % 11, limit=2 + (7 * i) % 9) for i in range(11)]
    decoding = DECODINGS[kind]
    expected = jobs.roll_out(jobs.Layout(), model_dir, asked, decoding, IDS)
    results = ranks(number).run(
        jobs.roll_out,
        layout=layout,
        model_dir=model_dir,
        requests=asked[::-1],
        decoding=decoding,
        vocabulary=IDS,
        slots=3,
    )
    for found in results:
        assert found == expected


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["drawn", "autoregressive"])
@pytest.mark.parametrize("name", ["tp2", "pp2", pytest.param("tp2-pp2", marks=pytest.mark.slow)])
def test_rollouts_by_block_rows(models: TinyModels, ranks: WorkerGroups, name: str, kind: str):
    """Claim: forwards of fixed size, as GPUs replay them, make the same trajectories on every
    layout, with groups of slots in flight between the stages."""
    number, layout = LAYOUTS[name]
    arguments = {
        "model_dir": models.hf("student", tied=True, layers=2),
        "requests": [request(i, 1 + (5 * i) % 11, limit=2 + (7 * i) % 9) for i in range(11)],
        "decoding": DECODINGS[kind],
        "vocabulary": IDS,
    }
    expected = jobs.roll_out(jobs.Layout(), **arguments)
    options = {"slots": 5, "attention": "rows", "graphs": True}
    for found in ranks(number).run(jobs.roll_out, layout=layout, **arguments, **options):
        assert found == expected


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["dp2", "pp2-dp2", "cp2"])
def test_one_request_for_two_replicas(models: TinyModels, ranks: WorkerGroups, name: str):
    """Claim: a replica without a prompt is legal, and every rank gets the one trajectory."""
    number, layout = LAYOUTS[name]
    arguments = {
        "model_dir": models.hf("student", tied=True, layers=2),
        "requests": [request(0, 6, limit=5)],
        "decoding": DECODINGS["drawn"],
        "vocabulary": IDS,
    }
    expected = jobs.roll_out(jobs.Layout(), **arguments)
    assert ranks(number).run(jobs.roll_out, layout=layout, **arguments) == [expected] * number


@pytest.mark.distributed
@pytest.mark.parametrize("logit_shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize(
    "name", ["tp2", "pp2", "tp2-sp", "cp2", pytest.param("tp2-pp2-sp", marks=pytest.mark.slow)]
)
def test_on_policy(models: TinyModels, ranks: WorkerGroups, name: str, logit_shift: bool):
    """Claim (law 2 on layouts): training sees what the rollout saw, also where the rollout runs
    without sequence parallelism and training with it."""
    number, layout = LAYOUTS[name]
    results = ranks(number).run(
        jobs.on_policy_gap,
        layout=layout,
        model_dir=models.hf("student", tied=False),
        requests=[request(i, 2 + i, limit=9) for i in range(7)],
        decoding=Decoding(
            block_size=4, denoising_steps=3, temperature=1.0, logit_shift=logit_shift
        ),
        vocabulary=IDS,
        slots=4,
    )
    on_last_stage = [found for found in results if found is not None]
    assert on_last_stage
    for found in on_last_stage:
        assert found["spread"] > 1
        assert found["gap"] < 1e-4
    shares = [set(found["own"]) for found in on_last_stage]
    assert set.union(*shares) == set(range(on_last_stage[0]["places"]))
    assert ("cp" in name) == (not set.intersection(*shares)), "context ranks share the positions"


@pytest.mark.distributed
def test_replica_without_work(recorded: Recorded, ranks: WorkerGroups, tmp_path: Path):
    """Claim: fewer sequences than replicas is legal and changes nothing."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(recorded.rows(PLAIN)[0]) + "\n")
    keys = recorded.overrides(PLAIN)
    alone = jobs.replay_with_gradients(keys, path)
    for name in ("dp2", "tp2-dp2-sp", "cp2-dp2"):
        number, layout = LAYOUTS[name]
        results = ranks(number).run(
            jobs.replay_with_gradients, overrides=[*keys, *overrides(layout)], trajectories=path
        )
        for found in results:
            assert_losses(found, alone)
        assert_gradients(results[0]["gradients"], alone["gradients"])
