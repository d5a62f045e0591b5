"""Saves that are written while the run goes on."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm.checkpoint import Checkpoints
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.storage import sharded_save
from tests import training_run
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.layouts import overrides as layout_overrides
from tests.distributed.workers import WorkerGroups
from tests.faults.conftest import Job
from tests.faults.disturbed import Disturbance
from tests.training_run import STEPS, metrics

pytestmark = pytest.mark.distributed


def tensors_of(out: Path, step: int) -> dict[str, str]:
    """Checksums of the files of weights and optimizer."""
    files = read_manifest(out / "checkpoints" / f"step_{step:07d}").sha256
    return {name: value for name, value in files.items() if name.startswith("weights/__")}


def test_a_save_holds_the_state_of_its_step(
    fault_model: Path, fault_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Claim: what is written after the next step has already changed weights and optimizer is what
    they were when the save began, bit for bit."""
    plain, late = tmp_path / "plain", tmp_path / "late"
    options = "train.steps=5", "checkpoint.every=2"
    arguments = training_run.overrides(fault_model, fault_prompts, plain, *options)
    jobs.train_run([*arguments, "checkpoint.async_save=false"])

    released, order = threading.Event(), []
    write, poll, finish = sharded_save._File.write, Checkpoints.poll, Checkpoints.finish

    def held_back(file: Any) -> Any:
        assert released.wait(600)
        order.append("written")
        return write(file)

    def release(original: Any) -> Any:
        def call(checkpoints: Checkpoints) -> None:
            order.append(original.__name__)
            released.set()
            original(checkpoints)

        return call

    monkeypatch.setattr(sharded_save._File, "write", held_back)
    monkeypatch.setattr(Checkpoints, "poll", release(poll))
    monkeypatch.setattr(Checkpoints, "finish", release(finish))
    begin = sharded_save.ShardedSave.__init__

    def begin_held(save: Any, *arguments: Any, **options: Any) -> None:
        released.clear()
        order.append("begun")
        begin(save, *arguments, **options)

    monkeypatch.setattr(sharded_save.ShardedSave, "__init__", begin_held)
    arguments = training_run.overrides(fault_model, fault_prompts, late, *options)
    jobs.train_run([*arguments, "checkpoint.async_save=true"])
    first = order.index("begun")
    assert order[first : first + 3] == ["begun", "poll", "written"], order  # a step later
    for step in (2, 4, 5):
        assert tensors_of(late, step) == tensors_of(plain, step)
    assert metrics(late) == metrics(plain)


def test_replicas_share_what_is_written(
    ranks: WorkerGroups, models: TinyModels, fault_prompts: Path, tmp_path: Path
):
    """Claim: every rank of two replicas writes about half of a checkpoint."""
    number, layout = LAYOUTS["dp2"]
    model = models.hf("student", tied=False, layers=4)
    arguments = training_run.overrides(model, fault_prompts, tmp_path / "run", "train.steps=2")
    ranks(number).run(
        jobs.train_run, overrides=[*arguments, *layout_overrides(layout)], timeout=300
    )
    files = read_manifest(tmp_path / "run" / "checkpoints" / "step_0000002").files
    shares = [
        sum(size for name, size in files.items() if name.startswith(f"weights/__{rank}_"))
        for rank in range(number)
    ]
    assert min(shares) > 0.8 * max(shares), shares


@pytest.mark.parametrize("function", ["_File.write", "ShardedSave.write_index"])
def test_nothing_outlives_a_killed_rank(job: Any, function: str):
    """Claim: a rank that is killed in the middle of a save leaves no process behind, and the same
    command goes on."""
    command: Job = job(1, "checkpoint.every=2")
    kill = Disturbance(
        function=f"megatron_opdlm.storage.sharded_save:{function}", call=2, action="kill"
    )
    (ended,) = command(disturbance=kill)
    assert ended.code == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.killpg(ended.process, 0)
    assert [row["step"] for row in command.continued()] == list(range(1, STEPS + 1))


def test_a_run_directory_holds_no_pickle_but_the_index(
    fault_model: Path, fault_prompts: Path, tmp_path: Path
):
    """Claim: of all files that a run leaves, only the index of a checkpoint is a pickle, and only
    its tensors are archives of torch; each of both loads without running code."""
    import pickle
    import zipfile

    import torch

    from megatron_opdlm.storage.safe_metadata import read_common, read_metadata

    out = tmp_path / "run"
    options = "train.steps=2", "logging.tensorboard=true", "logging.samples_every=1"
    jobs.train_run(training_run.overrides(fault_model, fault_prompts, out, *options))
    seen = set()
    for file in (file for file in out.rglob("*") if file.is_file()):
        content, place = file.read_bytes(), file.relative_to(out).as_posix()
        if file.name == ".metadata":
            assert read_metadata(file.parent).state_dict_metadata
        elif file.name == "common.pt":
            assert read_common(file.parent)
        elif file.suffix == ".distcp":
            index = read_metadata(file.parent)
            for part in index.storage_data.values():
                if part.relative_path == file.name:
                    archive = content[part.offset : part.offset + part.length]
                    (tmp_path / "part").write_bytes(archive)
                    torch.load(tmp_path / "part", weights_only=True)
        else:
            assert not zipfile.is_zipfile(file), place
            with pytest.raises(
                (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)
            ):
                pickle.loads(content)
            continue
        seen.add(file.suffix or file.name)
    assert seen == {".metadata", ".pt", ".distcp"}
