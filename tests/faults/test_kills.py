"""SIGKILL at random moments over a training run, its saves included.

The short form kills 20 times. The long one, ``FAULT_KILLS=200 pytest -s`` on this file, prints what
was hit.
"""

import functools
import importlib
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_opdlm.model_files.manifest import check_contents, read_manifest
from tests import training_run
from tests.distributed.workers import WorkerGroup, WorkerGroups
from tests.end_to_end import killed
from tests.end_to_end.killed import KillWithin
from tests.training_run import metrics

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("FAULT_KILLS", "20"))
SEED = 5
SECONDS = 300  # for one start on a busy machine

# Where a kill's clock starts, and how long it may run (seconds): together they cover a run from its
# first file to its last, each phase about as often as another.
MOMENTS = {
    "set-up": ("megatron_opdlm.run.opening:build_student", 1, 0.3),
    "loading": ("megatron_opdlm.checkpoint:verify", 1, 0.2),
    "rollout": ("megatron_opdlm.run.session:generate_over_copies", 3, 0.2),
    "teacher": ("megatron_opdlm.run.session:score", 3, 0.05),
    "update": ("megatron_opdlm.update:update", 5, 0.1),
    "metrics": ("megatron_opdlm.metrics:append_jsonl", 3, 0.01),
    "begin of a save": ("megatron_opdlm.checkpoint:Checkpoints.save", 3, 0.1),
    "writing tensors": ("megatron_opdlm.storage.sharded_save:_File.write", 4, 0.01),
    "index": ("megatron_opdlm.storage.sharded_save:ShardedSave.write_index", 3, 0.01),
    "manifest": ("megatron_opdlm.checkpoint:write_manifest", 3, 0.01),
    "publishing": ("megatron_opdlm.checkpoint:publish", 3, 0.01),
    "latest": ("megatron_opdlm.storage.step_directories:write_text", 3, 0.01),
    "removal": ("megatron_opdlm.storage.step_directories:StepDirectories.remove", 2, 0.005),
}


def random_kill(draw: random.Random) -> tuple[str, KillWithin]:
    name = draw.choice(list(MOMENTS))
    function, calls, seconds = MOMENTS[name]
    return name, KillWithin(
        function=function,
        call=draw.randint(1, calls),
        seconds=seconds,
        seed=draw.randrange(1 << 30),
    )


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_exist(name: str):
    """Claim: the functions at which clocks start are there, so no drawn moment fails by name."""
    module, _, path = MOMENTS[name][0].partition(":")
    assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def newest(out: Path) -> int:
    """Step of the checkpoint that ``latest`` names, every byte of it checked; 0: there is none."""
    pointer = out / "checkpoints" / "latest"
    if not pointer.exists():
        return 0
    checkpoint = pointer.parent / pointer.read_text().strip()
    manifest = read_manifest(checkpoint)
    check_contents(checkpoint, manifest)
    assert manifest.sha256 and manifest.step is not None
    return manifest.step


def state_of(checkpoint: Path) -> dict[str, str]:
    """Checksums of all tensors of weights and optimizer, and of the counters."""
    files = read_manifest(checkpoint).sha256
    kept = ("weights/__", "weights/common.pt", "state.json")
    return {name: value for name, value in files.items() if name.startswith(kept)}


@pytest.fixture(scope="module")
def one_rank(forks: WorkerGroups) -> WorkerGroup:
    return forks(1)


@pytest.mark.timeout(60 + 60 * KILLS)
def test_killed_at_random_moments(
    one_rank: WorkerGroup, fault_model: Path, fault_prompts: Path, tmp_path: Path
):
    """Claim: whenever a run is killed, the checkpoint that had been published is there, whole, and
    the same command goes on to the numbers, weights and optimizer state of a run that was not
    killed, bit for bit."""

    def command(out: Path, *more: str) -> list[str]:
        options = "checkpoint.every=1", "checkpoint.keep=2"
        return training_run.overrides(fault_model, fault_prompts, out, *options, *more)

    undisturbed = tmp_path / "undisturbed"
    (ended,) = one_rank.run(killed.run, overrides=command(undisturbed), timeout=SECONDS)
    assert ended["code"] == 0, ended
    expected = metrics(undisturbed), state_of(undisturbed / "checkpoints" / "step_0000008")

    draw, hit, runs = random.Random(SEED), Counter[str](), 0
    while hit.total() < KILLS:
        out, runs, step, code = tmp_path / f"run{runs}", runs + 1, 0, -9
        while code == -9:
            # After the last kill, and where a run resists for long, it is left alone.
            name, kill = random_kill(draw) if hit.total() < KILLS else ("", None)
            background = f"checkpoint.async_save={draw.choice(['true', 'false'])}"
            (ended,) = one_rank.run(
                killed.run, overrides=command(out, background), kill=kill, timeout=SECONDS
            )
            code = ended["code"]
            assert code in (0, -9), (name, kill, ended)
            assert newest(out) >= step, (name, kill, "a published checkpoint was lost")
            step = newest(out)
            if code == -9:
                hit[name] += 1
        assert metrics(out) == expected[0]
        assert state_of(out / "checkpoints" / "step_0000008") == expected[1]
        assert not [file for file in out.rglob("*") if ".tmp" in file.name or ".old" in file.name]
    print(f"\n{hit.total()} kills over {runs} runs: {dict(hit)}")
