"""Disks that fill up, that refuse large files, and that cannot be written at all."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_opdlm.model_files.manifest import check_contents, read_manifest
from tests import training_run
from tests.distributed.workers import WorkerGroup, WorkerGroups
from tests.end_to_end import killed
from tests.training_run import metrics

pytestmark = pytest.mark.distributed

SECONDS = 300
MIB = 1 << 20
LOGS = Path(tempfile.mkdtemp(prefix="faults-"))  # not on the disks that are full or read-only


@pytest.fixture(scope="module")
def one_rank(forks: WorkerGroups) -> WorkerGroup:
    return forks(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk(options)``: a file system in memory, mounted or mounted anew. Skips where this
    user may not mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        again = ["-o", f"remount,{options}"] if mounted else ["-o", options]
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            assert not mounted, done.stderr
            pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=60)


def start(one_rank: WorkerGroup, arguments: list[str], **options: int) -> tuple[int, str]:
    """Exit code and the ``error:`` line, if any, of a start."""
    (ended,) = one_rank.run(
        killed.run, overrides=arguments, log=LOGS / "run.log", timeout=SECONDS, **options
    )
    lines = [line for line in ended["log"].splitlines() if line.startswith("error:")]
    assert len(lines) <= 1 and "Traceback" not in ended["log"], ended["log"]
    return ended["code"], "".join(lines)


def published(out: Path) -> list[str]:
    """Names of the checkpoints, each of them whole; nothing else is left."""
    names = []
    for path in sorted((out / "checkpoints").glob("*step_*")):
        check_contents(path, read_manifest(path))
        names.append(path.name)
    return names


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_fills_up(
    one_rank: WorkerGroup,
    small_disk: Callable[[str], Path],
    fault_model: Path,
    fault_prompts: Path,
    tmp_path: Path,
    background: str,
):
    """Claim: where a save does not fit, the run ends with exit code 1 and one line that says so;
    the checkpoint before it is whole; with room on the disk, the same command goes on to the
    undisturbed run's numbers."""
    out, free = small_disk("size=1m") / "run", tmp_path / "undisturbed"
    options = "checkpoint.keep=3", f"checkpoint.async_save={background}"
    undisturbed = training_run.overrides(fault_model, fault_prompts, free, *options)
    assert start(one_rank, undisturbed) == (0, "")
    one = sum(f.stat().st_size for f in (free / "checkpoints" / "step_0000004").rglob("*"))
    small_disk(f"size={5 * one // 2}")  # two and a half checkpoints

    arguments = training_run.overrides(fault_model, fault_prompts, out, *options)
    code, line = start(one_rank, arguments)
    assert code == 1 and "No space left on device" in line, line
    assert "checkpoint of step 6 not written" in line and "step_0000004 is untouched" in line
    assert published(out) == ["step_0000002", "step_0000004"]
    small_disk(f"size={9 * one}")
    assert start(one_rank, arguments) == (0, "")
    assert metrics(out) == metrics(free)
    assert published(out) == published(free)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_write_that_fails(
    one_rank: WorkerGroup, fault_model: Path, fault_prompts: Path, tmp_path: Path, background: str
):
    """Claim: the same, where the system refuses to write a file to its end."""
    out = tmp_path / "run"
    arguments = training_run.overrides(
        fault_model, fault_prompts, out, f"checkpoint.async_save={background}", "train.steps=4"
    )
    code, line = start(one_rank, arguments, largest_file=MIB // 4)
    assert code == 1 and "File too large" in line and "there is no earlier one" in line, line
    assert published(out) == []
    assert start(one_rank, arguments) == (0, "")
    code, line = start(one_rank, [*arguments, "train.steps=4"], largest_file=MIB // 4)
    assert (code, line) == (0, "")  # nothing is left to save
    assert published(out) == ["step_0000002", "step_0000004"]


def test_a_directory_that_cannot_be_written(
    one_rank: WorkerGroup,
    small_disk: Callable[[str], Path],
    fault_model: Path,
    fault_prompts: Path,
):
    """Claim: a run directory that has become read-only is a clear error, and nothing in it
    changes."""
    out = small_disk("size=64m") / "run"
    arguments = training_run.overrides(fault_model, fault_prompts, out)
    assert start(one_rank, [*arguments, "checkpoint.every=4"]) == (0, "")
    shutil.rmtree(out / "checkpoints" / "step_0000008")
    (out / "checkpoints" / "latest").write_text("step_0000004\n")
    small_disk("ro,size=64m")
    code, line = start(one_rank, arguments)
    assert code == 2 and "may not be written to" in line, line
    small_disk("rw,size=64m")
    assert published(out) == ["step_0000004"]
    assert start(one_rank, arguments) == (0, "")


def test_a_file_where_checkpoints_should_be(
    one_rank: WorkerGroup, fault_model: Path, fault_prompts: Path, tmp_path: Path
):
    """Claim: what is in the way of the first save is found before the first step."""
    out = tmp_path / "run"
    arguments = training_run.overrides(fault_model, fault_prompts, out, "train.steps=2")
    assert start(one_rank, [*arguments, "checkpoint.every=9"]) == (0, "")
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").write_text("")
    code, line = start(one_rank, arguments)
    assert code == 2 and f"{out / 'checkpoints'} is no directory; move it away" in line, line
