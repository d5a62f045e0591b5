"""A training run of low-rank terms: nothing else moves, it can be killed and moved to another
layout, and its export is the student that was trained.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from checkpoint_tools import export_hf, inspect
from megatron_opdlm.model.attention_plan import causal_plan
from megatron_opdlm.model_files.manifest import LowRank, read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from tests import training_run
from tests.conftest import MASK
from tests.distributed import jobs, lora_jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.layouts import overrides as layout_overrides
from tests.distributed.workers import WorkerGroups
from tests.end_to_end import killed
from tests.end_to_end.killed import Kill
from tests.end_to_end.test_resume import assert_same_steps, cut_back
from tests.training_run import STEPS, metrics

pytestmark = pytest.mark.distributed

TARGETS = ("linear_qkv", "linear_fc1", "linear_fc2")
LORA = ("lora.rank=4", "lora.alpha=8", f"lora.targets=[{','.join(TARGETS)}]")


@pytest.fixture(scope="module")
def undisturbed(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    jobs.train_run(training_run.overrides(model, prompts, out, *LORA))
    training_run.assert_steps(metrics(out))
    return out


def checkpoint(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def terms(run: Path) -> lora_jobs.Terms:
    """Factors that a run ended with."""
    found = lora_jobs.initial_terms([f"model.path={checkpoint(run)}", *LORA])
    assert found is not None
    return found


def test_only_the_terms_are_trained(undisturbed: Path, model: Path):
    """Claim: every factor moved, and the weights beside them are the start's bit for bit."""
    student = lora_jobs.open_student([f"model.path={checkpoint(undisturbed)}", *LORA])
    mask = f"model.mask_token_id={MASK}"
    start = lora_jobs.initial_terms([f"model.path={model}", mask, *LORA])
    after = lora_jobs.whole_terms(student.model, lambda p: p.data)
    assert start is not None and after is not None
    assert all(not np.array_equal(after[key], start[key]) for key in start)
    base = jobs.under_hf_names(student.model, lambda p: p.data)
    assert base is not None
    with open_weights(model) as expected:
        for name, value in base.items():
            assert np.array_equal(value, expected.get(name).numpy()), name


def test_the_export_is_the_student(
    undisturbed: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Claim: transformers' logits of the export are the live student's to 1e-5, the export's own
    comparison with the checkpoint holds, and the checkpoint says what it holds."""
    saved, out = checkpoint(undisturbed), tmp_path / "exported"
    manifest = read_manifest(saved)
    assert manifest.low_rank == LowRank(rank=4, alpha=8.0, targets=TARGETS)
    facts = dict(inspect.megatron_facts(saved))
    assert facts["low-rank terms"] == "rank 4, alpha 8, beside linear_qkv, linear_fc1, linear_fc2"
    shape = read_shape(saved / "huggingface")
    export_hf.convert(saved, out, manifest, shape, model_format="a2d-qwen3", dtype="fp32")
    assert capsys.readouterr().out.count("verified") == 3
    live = lora_jobs.open_student([f"model.path={saved}", *LORA]).model
    ids, read = torch.arange(20) * 2, torch.arange(20)
    with torch.no_grad():
        plan = causal_plan([20], 20, torch.device("cpu"), read=read)
        hidden = jobs.final_hidden(live, ids, read, plan, read)
        expected = Qwen3ForCausalLM.from_pretrained(out)(ids[None]).logits[0].numpy()
        start = Qwen3ForCausalLM.from_pretrained(model)(ids[None]).logits[0].numpy()
    assert hidden is not None
    found = jobs.whole_logits(live, hidden)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(start - expected).max() > 0.1


def test_killed_and_started_again(
    forks: WorkerGroups, undisturbed: Path, model: Path, prompts: Path, tmp_path: Path
):
    """Claim: the same command goes on; all numbers and every bit of the factors are those of the
    run that was not killed."""
    out = tmp_path / "run"
    command = training_run.overrides(model, prompts, out, *LORA)
    kills = [
        Kill(function="megatron_opdlm.checkpoint:publish", call=2),
        Kill(function="megatron_opdlm.update:update", call=5),
        None,
    ]
    for kill in kills:
        (ended,) = forks(1).run(killed.run, overrides=command, kill=kill, timeout=150)
        assert ended["code"] == (0 if kill is None else -9), ended
    assert metrics(out) == metrics(undisturbed)
    expected, found = terms(undisturbed), terms(out)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["tp2-pp2-sp"])
def test_resumed_at_another_layout(
    ranks: WorkerGroups, undisturbed: Path, model: Path, prompts: Path, tmp_path: Path, name: str
):
    """Claim: resumed on a layout, and what that saved resumed on one rank, a run reports the
    undisturbed run's steps."""
    number, layout = LAYOUTS[name]
    out = cut_back(undisturbed, tmp_path / "run", 4)
    command = training_run.overrides(model, prompts, out, *LORA)
    ranks(number).run(jobs.train_run, overrides=[*command, *layout_overrides(layout)], timeout=120)
    assert_same_steps(metrics(out), metrics(undisturbed))
    back = cut_back(out, tmp_path / "back", 6)
    jobs.train_run(training_run.overrides(model, prompts, back, *LORA))
    assert_same_steps(metrics(back), metrics(undisturbed))


def test_the_teacher_of_its_own_changes_nothing(
    undisturbed: Path, model: Path, prompts: Path, tmp_path: Path
):
    """Claim: with a second model as teacher the run is the same, number for number."""
    out = tmp_path / "run"
    jobs.train_run(training_run.overrides(model, prompts, out, *LORA, "lora.share_teacher=false"))
    assert metrics(out) == metrics(undisturbed)
