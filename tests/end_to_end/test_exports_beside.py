"""``checkpoint.export``: a directory for serving beside every kept checkpoint, made by a process of
its own, which training never waits for before its end and never needs.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_opdlm.checkpoint import Checkpoints
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.run.exports import Exports
from tests import training_run
from tests.conftest import MASK
from tests.distributed import jobs
from tests.distributed.workers import WorkerGroups
from tests.end_to_end import killed
from tests.end_to_end.killed import Kill
from tests.training_run import STEPS, metrics

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
LAST = f"step_{STEPS:07d}"


def test_a_killed_run_makes_its_exports_when_it_goes_on(
    forks: WorkerGroups, plain: Path, model: Path, prompts: Path, tmp_path: Path
):
    """Claim: a SIGKILL while an export is made leaves nothing under a final name; the same command
    goes on to the numbers of a run without exports, and ends with the exports of the checkpoints
    that are kept and no others, each what ``opdlm export`` makes."""
    out = tmp_path / "run"
    keys = ["checkpoint.keep=1", "checkpoint.async_save=false", "checkpoint.export=[sdar]"]
    command = training_run.overrides(model, prompts, out, *keys)
    kill = Kill(function="megatron_opdlm.run.exports:Exports._start", call=1, moment="after")
    (ended,) = forks(1).run(killed.run, overrides=command, kill=kill, timeout=150)
    assert ended["code"] == -9, ended
    exports = out / "exports" / "sdar"
    assert not list(exports.glob("step_???????"))
    exports.mkdir(parents=True, exist_ok=True)
    (exports / "step_0000002.tmp-1").mkdir()  # as a kill a moment later leaves it
    (ended,) = forks(1).run(killed.run, overrides=command, kill=None, timeout=200)
    assert ended["code"] == 0, ended
    assert f"note: the end of the run waits for the exports in {out / 'exports'}" in ended["log"]
    assert metrics(out) == metrics(plain)
    assert [path.name for path in exports.iterdir()] == [LAST]
    kept = [path.name for path in (out / "checkpoints").iterdir()]
    assert sorted(kept) == ["latest", LAST], "one that was spared for its export is gone as well"
    again = tmp_path / "again"
    export = ["-m", "checkpoint_tools.export_hf", "--checkpoint", str(out / "checkpoints" / LAST)]
    done = subprocess.run(
        [sys.executable, *export, "--out", str(again), "--format", "sdar", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    made = {file.name: file.read_bytes() for file in (exports / LAST).iterdir() if file.is_file()}
    assert made == {file.name: file.read_bytes() for file in again.iterdir() if file.is_file()}


def test_an_export_that_fails_is_told_once(plain: Path, tmp_path: Path):
    """Claim: the first failure of a format is said with its reason, the others in one line at the
    end, and nothing is tried twice; the checkpoints stay."""
    checkpoints = tmp_path / "checkpoints"
    for step in (6, 8):
        name = f"step_{step:07d}"
        shutil.copytree(plain / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(LAST + "\n")
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "sdar").write_text("in the way\n")
    said: list[str] = []
    exports = Exports(
        directory=tmp_path / "exports",
        formats=["sdar"],
        checkpoints=Checkpoints(
            directory=checkpoints,
            keep=2,
            source=plain,
            config_yaml="",
            dtype="fp32",
            block_contract=BlockContract(mask_token_id=MASK, block_size=4),
        ),
        say=said.append,
    )
    exports.begin()
    exports.finish(lambda: None, lambda: False)
    waits, first, end = said
    assert "waits for the exports" in waits
    assert first.startswith(f"{LAST} was not exported as sdar (") and "is no directory" in first
    assert end.startswith(
        f"not exported: sdar/step_0000006, sdar/{LAST}; the checkpoints are whole"
    )
    assert len([path for path in checkpoints.iterdir() if path.is_dir()]) == 2


def test_an_export_dies_with_its_run(tmp_path: Path):
    """Claim: a SIGKILL of the process that started it alone ends it too."""
    sleeper = tmp_path / "sleeper.py"
    pid = tmp_path / "pid"
    sleeper.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(120)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'megatron_opdlm.supervision.follower',"
        " str(os.getpid()), 'sleeper'])\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    run = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(pid.read_text())
    run.send_signal(signal.SIGKILL)
    run.wait()
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


def test_a_format_that_cannot_hold_the_student_is_refused_first(
    model: Path, prompts: Path, tmp_path: Path
):
    """Claim: before any model is read, with the formats that can."""
    for key, reason in (
        (
            "[gguf]",
            r"checkpoint.export=gguf is no format .*use checkpoint.export=a2d-qwen3 or sdar",
        ),
        ("[llama]", r"checkpoint.export=llama is for other models: it is a Qwen3"),
    ):
        keys = [f"checkpoint.export={key}"]
        with pytest.raises(InputError, match=reason):
            jobs.train_run(training_run.overrides(model, prompts, tmp_path / "run", *keys))
    assert not (tmp_path / "run").exists()
