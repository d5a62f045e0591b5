"""Low-rank terms: loss and gradients are those of an independent dense computation on every layout,
nothing else is trained, and a checkpoint with terms is the model that it was in every use.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from megatron_opdlm.model import lora
from megatron_opdlm.model_files.manifest import LowRank
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.parallel import Layout
from tests import oracle
from tests.conftest import TinyModels
from tests.distributed import jobs, lora_jobs
from tests.distributed.layouts import LAYOUTS, overrides
from tests.distributed.test_layout_invariance import assert_gradients, assert_losses
from tests.distributed.workers import WorkerGroups
from tests.recorded import PLAIN, SHIFTED, Case, Recorded
from tests.tiny_requests import IDS, request

RANK, ALPHA = 3, 5.0
LORA = [f"lora.rank={RANK}", f"lora.alpha={ALPHA}"]
CASES = pytest.mark.parametrize("case", [PLAIN, SHIFTED], ids=lambda case: case.name)
SOME_LAYOUTS = ("tp2", "pp2", "dp2", "cp2", "tp2-sp", "tp2-pp2-sp")


class Adapted:
    """Checkpoints with terms of the recorded cases, and what replaying them must give."""

    def __init__(self, recorded: Recorded, models: TinyModels, folder: Path) -> None:
        self.recorded, self._models, self._folder = recorded, models, folder
        self._made: dict[str, tuple[Path, lora_jobs.Terms]] = {}
        self._expected: dict[str, dict[str, Any]] = {}

    def checkpoint(self, case: Case) -> Path:
        return self._saved(case)[0]

    def _saved(self, case: Case) -> tuple[Path, lora_jobs.Terms]:
        if case.name not in self._made:
            keys = [*self.recorded.overrides(case), *LORA]
            self._made[case.name] = lora_jobs.save_adapted(keys, self._folder / case.name)
        return self._made[case.name]

    def overrides(self, case: Case) -> list[str]:
        """Replays the checkpoint's student against the case's teacher, merged."""
        return [*self.recorded.overrides(case), f"model.path={self.checkpoint(case)}"]

    def expected(self, case: Case) -> dict[str, Any]:
        """Losses, and gradients of the factors, by transformers and autograd."""
        if case.name not in self._expected:
            student = oracle.load(self._models.hf("student", tied=case.tied))
            saved = self._saved(case)[1]
            terms = {key: torch.tensor(value, requires_grad=True) for key, value in saved.items()}
            oracle.add_low_rank(student, terms, ALPHA / RANK)
            losses = self.recorded.losses(case, student, self.recorded.rows(case))
            mean = torch.stack(losses).mean()
            mean.backward()
            gradients = {k: term.grad for k, term in terms.items() if term.grad is not None}
            self._expected[case.name] = {
                "loss": mean.item(),
                "per_sequence": [loss.item() for loss in losses],
                "grad_norm": torch.stack([g.norm() for g in gradients.values()]).norm().item(),
                "gradients": {key: g.numpy() for key, g in gradients.items()},
            }
        return self._expected[case.name]


@pytest.fixture(scope="module")
def adapted(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder = tmp_path_factory.mktemp("adapted")
    return Adapted(Recorded(models, folder), models, folder)


def assert_as_expected(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for found in results:
        assert_losses(found, expected)
    assert_gradients(results[0]["gradients"], expected["gradients"])


@CASES
@pytest.mark.parametrize("recompute", ["false", "true", "mlp"])
def test_one_rank(adapted: Adapted, case: Case, recompute: str):
    """Claim: loss, gradient norm and the gradients of all factors are those of transformers with
    low-rank terms; nothing else has a gradient."""
    keys = [*adapted.overrides(case), *LORA, f"model.recompute={recompute}"]
    found = lora_jobs.replay_with_gradients(keys, adapted.recorded.file(case))
    expected = adapted.expected(case)
    assert all(np.any(gradient) for gradient in expected["gradients"].values())
    assert_as_expected([found], expected)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SOME_LAYOUTS)
def test_layouts(adapted: Adapted, ranks: WorkerGroups, name: str):
    """Claim: the same on every layout, from the one checkpoint; factors that tensor ranks or
    replicas share have equal gradients bit for bit."""
    number, layout = LAYOUTS[name]
    case = SHIFTED if "pp2" in name else PLAIN  # tied: both stages hold the frozen embedding
    keys = [*LORA, *overrides(layout), "update.tokens_per_microbatch=110"]
    keys.append(f"model.recompute={str('sp' in name).lower()}")
    results = ranks(number).run(
        lora_jobs.replay_with_gradients,
        overrides=[*adapted.overrides(case), *keys],
        trajectories=adapted.recorded.file(case),
    )
    assert_as_expected(results, adapted.expected(case))


@CASES
def test_merged_and_not_merged(adapted: Adapted, case: Case):
    """Claim: a model without terms takes the checkpoint merged, and loses nothing."""
    found = jobs.replay_with_gradients(adapted.overrides(case), adapted.recorded.file(case))
    expected = adapted.expected(case)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["per_sequence"] == pytest.approx(expected["per_sequence"], rel=1e-5, abs=1e-6)
    plain = adapted.recorded.expected(case)["loss"]
    assert abs(plain - expected["loss"]) > 0.01 * plain  # the terms matter


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "tp2-pp2-sp"])
def test_new_terms(adapted: Adapted, ranks: WorkerGroups, name: str):
    """Claim: B is zero, and A the same bit for bit on every layout, another for another seed, layer
    and linear."""
    keys = [*adapted.recorded.overrides(PLAIN), *LORA]
    expected = lora_jobs.initial_terms(keys)
    number, layout = LAYOUTS[name]
    found, *_ = ranks(number).run(lora_jobs.initial_terms, overrides=[*keys, *overrides(layout)])
    assert expected is not None and expected.keys() == found.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value), key
        bound = value.shape[1] ** -0.5
        assert not value.any() if key[2] == "b" else 0.9 * bound < np.abs(value).max() <= bound
    firsts = [
        value[0, 0] * value.shape[1] ** 0.5 for key, value in expected.items() if key[2] == "a"
    ]
    assert len(set(firsts)) == len(firsts) == 16
    other = lora_jobs.initial_terms([*keys, "train.seed=1"])
    assert other is not None
    assert not np.array_equal(other[0, "linear_qkv", "a"], expected[0, "linear_qkv", "a"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2"])
def test_merged_weights(adapted: Adapted, ranks: WorkerGroups, name: str):
    """Claim: merging gives the same bits on every layout, and they are W + (alpha / rank) B A."""
    checkpoint = adapted.checkpoint(SHIFTED)
    expected = lora_jobs.merged_weights(Layout(), checkpoint)
    number, layout = LAYOUTS[name]
    found, *_ = ranks(number).run(lora_jobs.merged_weights, layout=layout, checkpoint=checkpoint)
    assert expected is not None and expected.keys() == found.keys()
    assert all(np.array_equal(found[key], value) for key, value in expected.items())
    terms, ffn = adapted._saved(SHIFTED)[1], 96
    with open_weights(adapted._models.hf("student", tied=True)) as start:
        for name, target, rows in (
            ("self_attn.o_proj", "linear_proj", slice(None)),
            ("mlp.down_proj", "linear_fc2", slice(None)),
            ("mlp.up_proj", "linear_fc1", slice(ffn, None)),
        ):
            key = f"model.layers.2.{name}.weight"
            a, b = (terms[2, target, factor].astype(np.float64) for factor in "ab")
            whole = start.get(key).double().numpy() + ALPHA / RANK * (b[rows] @ a)
            assert np.array_equal(expected[key], whole.astype(np.float32)), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2-sp", "pp2"])
def test_rollouts(adapted: Adapted, ranks: WorkerGroups, name: str):
    """Claim: the student generates with its terms: what the merged model generates."""
    number, layout = LAYOUTS[name]
    asked = [request(i, 1 + (5 * i) % 11, limit=2 + (7 * i) % 9) for i in range(5)]
    how = {"decoding": Decoding(block_size=3, denoising_steps=3), "vocabulary": IDS}
    expected = jobs.roll_out(Layout(), adapted.checkpoint(SHIFTED), asked, **how)
    keys = [*adapted.overrides(SHIFTED), *LORA, *overrides(layout)]
    for found in ranks(number).run(lora_jobs.responses, overrides=keys, requests=asked, **how):
        assert [t.response_ids for t in found] == [t.response_ids for t in expected]
    base = jobs.roll_out(Layout(), adapted._models.hf("student", tied=True), asked, **how)
    assert [t.response_ids for t in base] != [t.response_ids for t in expected]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2-sp", "pp2"])
def test_the_base_is_the_teacher(adapted: Adapted, ranks: WorkerGroups, name: str):
    """Claim: where the teacher is the student's start, no second model is built, and the targets
    are those of one bit for bit."""
    number, layout = LAYOUTS[name]
    model = f"model.path={adapted._models.hf('student', tied=False)}"
    keys = [*PLAIN.overrides, model, *LORA, *overrides(layout), "model.recompute=true"]
    results = ranks(number).run(
        lora_jobs.both_teachers, overrides=keys, rows=adapted.recorded.rows(PLAIN)
    )
    assert (True, True) in results and set(results) <= {None, (True, True)}


@pytest.mark.parametrize(
    "keys",
    [["lora.share_teacher=false"], ["teacher.path=TEACHER"], ["model.path=ADAPTED"]],
    ids=lambda keys: keys[0],
)
def test_a_teacher_of_its_own(adapted: Adapted, keys: list[str]):
    """Claim: another teacher, or a start that has terms itself, is a second model."""
    paths = {
        "TEACHER": str(adapted._models.hf("teacher", tied=False)),
        "ADAPTED": str(adapted.checkpoint(PLAIN)),
    }
    for name, path in paths.items():
        keys = [key.replace(name, path) for key in keys]
    model = f"model.path={adapted._models.hf('student', tied=False)}"
    found = lora_jobs.both_teachers(
        [*PLAIN.overrides, model, *LORA, *keys], adapted.recorded.rows(PLAIN)
    )
    assert found == (False, True)


def test_other_terms_than_the_checkpoint_s(adapted: Adapted):
    """Claim: a checkpoint's terms go on only as what they are."""
    keys = [*adapted.overrides(PLAIN), "lora.rank=2", f"lora.alpha={ALPHA}"]
    with pytest.raises(InputError, match=r"rank=3.*lora\.\* asks for .*rank=2"):
        lora_jobs.open_student(keys)


class NormedLinear(torch.nn.Module):
    """As Transformer Engine fuses them: y = W (w * x / rms(x)), the norm's result kept inside."""

    def __init__(self, weight: torch.Tensor, norm: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.layer_norm_weight = torch.nn.Parameter(weight), torch.nn.Parameter(norm)
        self.eps, self.config = 1e-6, SimpleNamespace(sequence_parallel=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        rms = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return (x / rms * self.layer_norm_weight) @ self.weight.t(), None


def test_a_norm_inside_the_linear():
    """Claim: the term reads what the weight reads, also where the norm is part of the linear: the
    sum is the linear with the merged weight."""
    jobs.join(Layout())
    draw = torch.Generator().manual_seed(0)
    weight, norm, x, b = (
        torch.randn(shape, generator=draw) for shape in [(6, 5), (5,), (4, 1, 5), (6, 2)]
    )
    linear = NormedLinear(weight, norm)
    adapter = lora.Adapter(
        linear, "linear_qkv", LowRank(rank=2, alpha=3.0, targets=("linear_qkv",))
    )
    adapter.initialise(0, 0)
    adapter.b.data.copy_(b)
    found = linear(x)[0] + adapter(lora._normed(linear, x))
    whole = lora.merged(weight, adapter.a, adapter.b, adapter.scale)
    torch.testing.assert_close(found, NormedLinear(whole, norm)(x)[0])
