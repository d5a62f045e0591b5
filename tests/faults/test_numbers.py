"""What is not finite, and what does not fit: the error names the phase and what to do, and keeps
what is needed to look at it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.supervision import activity, failures
from tests import training_run
from tests.conftest import LAST_TOKEN
from tests.faults.conftest import Job
from tests.faults.disturbed import Disturbance

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

Jobs = Callable[..., Job]
LONG_PROMPT = 450  # tokens; attention of a few of them needs tens of MiB at once


def replay_command(readme: str) -> list[str]:
    """Arguments of the command that a README gives."""
    (line,) = re.findall(r"^    torchrun .* -m megatron_opdlm.replay (.*)$", readme, re.MULTILINE)
    return line.split()


def test_a_failed_update_is_kept(job: Jobs, fault_model: Path):
    """Claim: a weight that turns to NaN in the middle of a run stops it on both ranks before the
    update, with the samples named; the batch and the weights from before it are kept, and the
    README's ``replay`` command fails with the same fault. On the healthy weights of the step before
    the batch gives the loss that the run reports once it has gone on."""
    poisoned = job(2, "optimizer.batch_size=5", "checkpoint.every=1", "checkpoint.keep=9")
    disturbance = Disturbance(
        function="megatron_opdlm.update:update", call=3, action="poison", rank=None
    )
    ended = poisoned(disturbance=disturbance)
    assert [one.code for one in ended] == [1, 1]
    assert len(training_run.metrics(poisoned.out)) == 2
    (error,) = ended[0].errors
    assert "the student's logits for sample 0 are not finite; nothing was updated" in error
    assert "the same holds for samples 1, 2, 3, 4" in error
    kept = poisoned.out / "failed" / "step_0000003"
    assert str(kept) in error
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert read_manifest(kept / "student").kind == "model"
    rows = [json.loads(line) for line in (kept / "trajectories.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(row.keys() == {"prompt_ids", "response_ids", "masked"} for row in rows)

    command = replay_command((kept / "README.md").read_text())
    again = poisoned.of(command, module="megatron_opdlm.replay")
    assert [one.code for one in again] == [1, 1]
    assert "the student's logits for sample 0 are not finite" in again[0].errors[0]

    healthy = poisoned.out / "checkpoints" / "step_0000002"
    out = poisoned.out / "healthy.json"
    replaced = [*command, "--student", str(healthy), "--out", str(out)]
    again = poisoned.of(replaced, module="megatron_opdlm.replay")
    assert [one.code for one in again] == [0, 0], again[0].log
    loss = json.loads(out.read_text())["loss"]
    assert loss == pytest.approx(poisoned.continued()[2]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("function", "phase", "keys"),
    [
        pytest.param(
            "run.session:generate_over_copies",
            "rollout",
            ("rollout.kv_cache_tokens", "rollout.slots"),
            marks=pytest.mark.slow,  # not certain: what malloc still holds may be enough
        ),
        (
            "run.session:score",
            "teacher",
            ("update.tokens_per_microbatch", "teacher.offload_targets"),
        ),
        ("update:update", "update", ("update.tokens_per_microbatch", "loss.chunk_rows")),
    ],
)
def test_out_of_memory(job: Jobs, tmp_path: Path, function: str, phase: str, keys: tuple[str, ...]):
    """Claim: where the operating system gives no more memory to one rank, both end; the error names
    rank, phase and step, keys of that phase to turn down, and the bytes that were asked for, which
    a library of C++ (std::bad_alloc, in the rollout's products) does not tell."""
    prompts = tmp_path / "long.jsonl"
    ids = [[7 + (i + row) % (LAST_TOKEN - 9) for i in range(LONG_PROMPT)] for row in range(16)]
    prompts.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in ids))
    hungry = job(2, f"data.path={prompts}", "rollout.prompts_per_step=16", "data.shuffle=false")
    disturbance = Disturbance(
        function=f"megatron_opdlm.{function}", call=1, action="exhaust memory", rank=1
    )
    first, second = hungry(disturbance=disturbance)
    assert (first.code, second.code) == (1, 1), second.log
    words = f"out of memory in phase {phase} of step 1"
    (error,) = first.errors
    assert error.startswith(f"error: rank 1 failed in phase {phase} of step 1: {words}")
    (error,) = second.errors
    assert error.startswith(f"error: rank 1: {words}")
    assert phase == "rollout" or re.search(r"\(\d+ bytes were asked for\)", error)
    assert all(key in error for key in keys)
    assert "Traceback" not in second.log


@pytest.mark.parametrize("phase", ["set-up", "rollout", "teacher", "update", "save", "states"])
def test_every_way_to_run_out_of_memory(phase: str):
    """Claim: what torch raises on a CPU, what it raises on a GPU and Python's own error all become
    the line of the phase; other errors stay what they are."""
    activity.enter(phase, 7)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    gpu = torch.OutOfMemoryError("out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total")
    for error, size in (
        (caught.value, f"{1 << 57} bytes"),
        (gpu, "2.50 GiB"),
        (MemoryError(), ""),
        (OSError(12, "Cannot allocate memory"), ""),
    ):
        line = str(failures.name(error))
        assert line.startswith(f"out of memory in phase {phase} of step 7")
        assert f"({size} were asked for)" in line or not size
        assert "\n" not in line
    other = ValueError("x")
    assert failures.name(other) is other
