"""Files of a checkpoint that are cut short or of which one bit has flipped.

``FAULT_FLIPS=20`` flips that many bits a file instead of one.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import check_contents, read_manifest
from megatron_opdlm.run import run_lock
from tests import training_run
from tests.distributed.workers import WorkerGroup, WorkerGroups
from tests.end_to_end import killed
from tests.training_run import metrics

pytestmark = pytest.mark.distributed

FLIPS = int(os.environ.get("FAULT_FLIPS", "1"))
SECONDS = 300


@pytest.fixture(scope="module")
def one_rank(forks: WorkerGroups) -> WorkerGroup:
    return forks(1)


@pytest.fixture(scope="module")
def finished(
    one_rank: WorkerGroup,
    fault_model: Path,
    fault_prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    arguments = training_run.overrides(fault_model, fault_prompts, out)
    (ended,) = one_rank.run(killed.run, overrides=arguments, timeout=SECONDS)
    assert ended["code"] == 0, ended
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A run that got no further than step 4; ``step_0000002`` is there as well."""
    copy = shutil.copytree(finished, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(copy / "checkpoints" / f"step_{step:07d}")
    (copy / "checkpoints" / "latest").write_text("step_0000004\n")
    return copy


def flip(file: Path, draw: random.Random) -> int:
    """Invert one bit; returns its number."""
    content, bit = bytearray(file.read_bytes()), draw.randrange(8 * file.stat().st_size)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return bit


def files_of(checkpoint: Path) -> list[Path]:
    """All but the file that says who works there."""
    return sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.name != run_lock.LOCK)


def check(checkpoint: Path) -> None:
    check_contents(checkpoint, read_manifest(checkpoint))


def test_every_flipped_bit_and_every_torn_file_is_found(out: Path):
    """Claim: no bit of any file of a checkpoint, its manifest included, can change unnoticed, and
    no file can lose its end."""
    checkpoint, draw = out / "checkpoints" / "step_0000004", random.Random(3)
    check(checkpoint)
    for file in files_of(checkpoint):
        whole = file.read_bytes()
        for _ in range(16 * FLIPS):
            bit = flip(file, draw)
            with pytest.raises(InputError, match="step_0000004") as error:
                check(checkpoint)
            assert file.name in str(error.value), (bit, error.value)
            file.write_bytes(whole)
        for size in {0, draw.randrange(len(whole) - 1), len(whole) - 2}:
            file.write_bytes(whole[:size])
            with pytest.raises(InputError, match="step_0000004"):
                check(checkpoint)
            file.write_bytes(whole)
    check(checkpoint)


@pytest.mark.parametrize("kind", ["flipped bit", "torn", "flipped latest"])
def test_a_damaged_checkpoint_is_refused_with_the_way_out(
    one_rank: WorkerGroup,
    finished: Path,
    out: Path,
    fault_model: Path,
    fault_prompts: Path,
    kind: str,
):
    """Claim: a start on a damaged newest checkpoint ends with exit code 2, changes nothing, and
    names the newest one that is whole and how to go on from it; doing so gives the undisturbed
    run's numbers."""
    checkpoints, draw = out / "checkpoints", random.Random(4)
    damaged = checkpoints / "step_0000004"
    largest = max(files_of(damaged), key=lambda file: file.stat().st_size)
    if kind == "flipped bit":
        flip(largest, draw)
    elif kind == "torn":
        largest.write_bytes(largest.read_bytes()[:-9])
    else:
        (checkpoints / "latest").write_bytes(b"step_000000\xb4\n")
    before = {file: file.read_bytes() for file in files_of(out)}
    arguments = training_run.overrides(fault_model, fault_prompts, out)
    (ended,) = one_rank.run(killed.run, overrides=arguments, timeout=SECONDS)
    assert ended["code"] == 2, ended
    (line,) = [line for line in ended["log"].splitlines() if line.startswith("error:")]
    way_out = "step_0000004" if kind == "flipped latest" else "step_0000002"
    assert f"{way_out} is whole: to go on from it, write its name into" in line
    assert kind == "flipped latest" or largest.name in line
    assert {file: file.read_bytes() for file in files_of(out)} == before

    (checkpoints / "latest").write_text(way_out + "\n")
    (ended,) = one_rank.run(killed.run, overrides=arguments, timeout=SECONDS)
    assert ended["code"] == 0, ended
    assert metrics(out) == metrics(finished)
    for step in (2, 4, 6, 8):
        check(checkpoints / f"step_{step:07d}")


def test_a_damaged_model_is_refused(
    one_rank: WorkerGroup, out: Path, fault_prompts: Path, tmp_path: Path
):
    """Claim: a run never starts from other weights than those that were saved."""
    checkpoint = out / "checkpoints" / "step_0000004"
    flip(max(files_of(checkpoint), key=lambda file: file.stat().st_size), random.Random(6))
    arguments = training_run.overrides(checkpoint, fault_prompts, tmp_path / "new")
    (ended,) = one_rank.run(killed.run, overrides=arguments, timeout=SECONDS)
    assert ended["code"] == 2 and "is damaged" in ended["log"], ended
    assert not (tmp_path / "new").exists()


def test_other_prompts_are_refused(
    one_rank: WorkerGroup, out: Path, fault_model: Path, tmp_path: Path
):
    """Claim: a run does not go on over a data file that has changed under it."""
    prompts = training_run.write_prompts(tmp_path / "prompts.jsonl", count=14)
    arguments = training_run.overrides(fault_model, prompts, out)
    arguments = [a for a in arguments if not a.startswith("data.path")]
    stored = (out / "config.yaml").read_text()
    path = next(
        line.split()[1]
        for line in stored.splitlines()
        if line.startswith("  path: ") and line.endswith("prompts.jsonl")
    )
    before = Path(path).read_bytes()
    Path(path).write_bytes(prompts.read_bytes())
    try:
        (ended,) = one_rank.run(
            killed.run, overrides=[*arguments, f"data.path={path}"], timeout=SECONDS
        )
    finally:
        Path(path).write_bytes(before)
    assert ended["code"] == 2 and f"data.path={path} has changed since" in ended["log"], ended


def test_a_run_that_went_back_keeps_what_it_saves(
    one_rank: WorkerGroup, finished: Path, fault_model: Path, fault_prompts: Path, tmp_path: Path
):
    """Claim: later checkpoints that a run left when it went back do not push out what it saves
    when it comes by again."""
    out = shutil.copytree(finished, tmp_path / "run")
    pointer = out / "checkpoints" / "latest"
    pointer.write_text("step_0000002\n")
    arguments = training_run.overrides(
        fault_model, fault_prompts, out, "checkpoint.keep=1", "checkpoint.async_save=false"
    )
    kill = killed.Kill(
        function="megatron_opdlm.run.session:generate_over_copies", call=5
    )  # in step 7
    (ended,) = one_rank.run(killed.run, overrides=arguments, kill=kill, timeout=SECONDS)
    assert ended["code"] == -9, ended
    assert pointer.read_text() == "step_0000006\n"
    check(out / "checkpoints" / "step_0000006")
    (ended,) = one_rank.run(killed.run, overrides=arguments, timeout=SECONDS)
    assert ended["code"] == 0, ended
    assert metrics(out) == metrics(finished)
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_0000008"]
