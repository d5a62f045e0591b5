"""Law 5 through whole models: every kind of loss on recorded states, tied and untied, on one rank
and on layouts; and weights that are not finite, which must end the job.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opdlm import update
from megatron_opdlm.divergence import STUDENT_FAULT, TEACHER_FAULT
from megatron_opdlm.errors import RunError
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS, overrides
from tests.distributed.test_layout_invariance import assert_gradients, assert_losses
from tests.distributed.workers import WorkerGroups
from tests.forking import REPOSITORY
from tests.recorded import PLAIN, Case, Recorded

CASES = {
    "top_k": ({"loss.top_k": 5}, {"top_k": 5}),
    "top_k-renormalise": (
        {"loss.top_k": 5, "loss.top_k_tail": "renormalise", "loss.kind": "jsd"},
        {"top_k": 5, "tail": "renormalise", "kind": "jsd"},
    ),
    "top_k-bucket": (
        {
            "loss.top_k": 3,
            "loss.top_k_tail": "bucket",
            "loss.kind": "mixed",
            "loss.reverse_weight": 0.4,
            "teacher.temperature": 1.5,
        },
        {
            "top_k": 3,
            "tail": "bucket",
            "kind": "mixed",
            "reverse_weight": 0.4,
            "temperature": 1.5,
        },
    ),
    "nucleus": (
        {"teacher.top_p": 0.8, "teacher.temperature": 0.8},
        {"top_p": 0.8, "temperature": 0.8},
    ),
    "reverse_kl": ({"loss.kind": "reverse_kl"}, {"kind": "reverse_kl"}),
    "nll": ({"loss.kind": "nll"}, {"kind": "nll"}),
}


def make_case(name: str, *, tied: bool) -> Case:
    keys, options = CASES[name]
    return Case(
        name=f"{name}-{'tied' if tied else 'untied'}",
        tied=tied,
        block_size=4,
        keys=tuple(f"{key}={value}" for key, value in keys.items()),
        oracle_options=options,
    )


@pytest.fixture(scope="module")
def recorded(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(models, tmp_path_factory.mktemp("losses"))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_every_loss(recorded: Recorded, ranks: WorkerGroups, name: str, tied: bool):
    """Claim: loss, gradient norm and every parameter's gradient are those of transformers and the
    dense formula, on one rank and with the vocabulary split; with tied weights also where the
    layers are split, so that two stages hold the same weight. Top-k losses in both forms of the
    teacher's targets."""
    case = make_case(name, tied=tied)
    expected = recorded.expected(case)
    keys = [*recorded.overrides(case), "update.tokens_per_microbatch=110", "loss.chunk_rows=5"]
    arguments: dict[str, Any] = {"trajectories": recorded.file(case)}
    has_two_forms = "top_k" in name and not tied  # the form knows nothing of tied weights
    forms: list[list[str]] = [[], ["teacher.targets=top_k"]] if has_two_forms else [[]]
    found = [jobs.replay_with_gradients([*keys, *form], **arguments) for form in forms]
    for layout, form in product(("tp2", "pp2") if tied else ("tp2",), forms):
        number, split = LAYOUTS[layout]
        more = [*overrides(split), *form]
        found += ranks(number).run(
            jobs.replay_with_gradients, overrides=[*keys, *more], **arguments
        )[:1]
    for result in found:
        assert_losses(result, expected)
        assert_gradients(result["gradients"], expected["gradients"])


def poison(source: Path, folder: Path, name: str, row: int, number: float) -> Path:
    """A copy of a Hugging Face directory with one weight that is not finite."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        if name in tensors:
            tensors[name][row, 3] = number
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return folder


def lonely_token(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """(number of a row under loss, a token of its prompt that no other row has)."""
    for number in range(len(rows) - 1, -1, -1):
        others = {
            token
            for i, row in enumerate(rows)
            for token in (*row["prompt_ids"], *row["response_ids"])
            if i != number
        }
        alone = set(rows[number]["prompt_ids"]) - others
        if alone and any(rows[number]["masked"]):
            return number, min(alone)
    raise AssertionError("the recorded rows have no such token")


@pytest.fixture(params=["teacher", "student"])
def poisoned(
    request: pytest.FixtureRequest, recorded: Recorded, models: TinyModels, tmp_path: Path
) -> tuple[str, int, list[str]]:
    """Whose input embedding of a token is not finite, the one sample that has the token, keys."""
    whose: str = request.param
    sample, token = lonely_token(recorded.rows(PLAIN))
    source = models.hf(whose, tied=False)
    made = poison(source, tmp_path / whose, "model.embed_tokens.weight", token, np.nan)
    key = {"teacher": "teacher.path", "student": "model.path"}[whose]
    keys = [*recorded.overrides(PLAIN), f"{key}={made}", "update.tokens_per_microbatch=60"]
    return whose, sample, keys


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "cp2"])
def test_a_poisoned_model_is_named_on_every_rank(
    recorded: Recorded, ranks: WorkerGroups, poisoned: tuple[str, int, list[str]], layout: str
):
    """Claim: the loss that is not finite stops every rank with the sample and whose value it
    was."""
    whose, sample, keys = poisoned
    number, split = LAYOUTS[layout]
    found = ranks(number).run(
        jobs.replay_error,
        overrides=[*keys, *overrides(split)],
        trajectories=recorded.file(PLAIN),
    )
    start = f"the {whose}'s logits for sample {sample} are not finite; nothing was updated: check"
    assert len(set(found)) == 1 and found[0].startswith(start), found


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_poisoned_output_weight(
    recorded: Recorded, models: TinyModels, tmp_path: Path, whose: str, number: float, kind: str
):
    """Claim: so does one number of an output weight, of a token that is nobody's label."""
    made = poison(models.hf(whose, tied=False), tmp_path / "made", "lm_head.weight", 66, number)
    key = {"teacher": "teacher.path", "student": "model.path"}[whose]
    keys = [*recorded.overrides(PLAIN), f"{key}={made}", f"loss.kind={kind}"]
    found = jobs.replay_error(keys, recorded.file(PLAIN))
    assert found.startswith(f"the {whose}'s logits for sample ") and "not finite" in found


@pytest.mark.parametrize(
    ("value", "fault", "words"),
    [
        (0.5, TEACHER_FAULT, "the teacher's logits for sample 8 "),
        (0.5, STUDENT_FAULT, "the student's logits for sample 8 "),
        (np.nan, TEACHER_FAULT | STUDENT_FAULT, "teacher's and student's logits for sample 8 "),
        (np.inf, 0, "the loss of sample 8 is"),
    ],
)
def test_a_fault_counts_also_where_the_loss_is_finite(value: float, fault: int, words: str):
    """Claim: a logit of minus infinity that leaves a finite loss stops the run, too; a loss that is
    not finite does without a fault."""
    jobs.join(Layout())
    states: Any = [SimpleNamespace(sample=sample) for sample in (9, 8)]
    batch: Any = SimpleNamespace(states=states, sequence=torch.tensor([0, 0, 1]))
    losses = torch.tensor([0.3, value], dtype=torch.float64)
    with pytest.raises(RunError) as caught:
        update._require_finite([batch], losses, torch.tensor([0, 0, fault]))
    assert str(caught.value).startswith(words)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_job_ends(recorded: Recorded, models: TinyModels, tmp_path: Path):
    """Claim: under a launcher the job ends with the error line and exit code 1, and writes
    nothing."""
    source = models.hf("teacher", tied=False)
    teacher = poison(source, tmp_path / "teacher", "lm_head.weight", 40, np.nan)
    student, out = models.hf("student", tied=False), tmp_path / "out.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["--nproc-per-node=2", "-m", "megatron_opdlm.replay", "--out", out]
    files = ["--student", student, "--teacher", teacher, "--trajectories", recorded.file(PLAIN)]
    ended = subprocess.run(
        [*launcher, *command, *files, *PLAIN.overrides, "model.tensor_parallel=2"],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 1
    assert "error: the teacher's logits for sample 0 are not finite" in ended.stderr
    assert not out.exists()
