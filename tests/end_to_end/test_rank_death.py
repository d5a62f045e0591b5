"""A rank that dies ends the job with an error within a minute; it does not hang. The same without a
launcher: tests/faults/test_ranks.py.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests import training_run
from tests.conftest import TinyModels
from tests.forking import REPOSITORY

pytestmark = pytest.mark.distributed

START_SECONDS = 180
END_SECONDS = 60
PYTHON = [sys.executable, "-W", "ignore", "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[psutil.Popen]:
    """A process in a group of its own, of which nothing is left at the end."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    with log.open("wb") as output:
        process = psutil.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = process.children(recursive=True) if process.is_running() else []
        for one in [process, *family]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


@pytest.fixture
def arguments(models: TinyModels, tmp_path: Path) -> list[str]:
    """Training without an end, on one replica a rank."""
    prompts = training_run.write_prompts(tmp_path / "prompts.jsonl")
    model = models.hf("student", tied=True, layers=2)
    endless = ["train.steps=100000", "data.epochs=100000", "checkpoint.every=100000"]
    return training_run.overrides(model, prompts, tmp_path / "run", *endless)


def wait_for_steps(out: Path, steps: int, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def test_the_launcher_ends_the_job(arguments: list[str], tmp_path: Path):
    """Claim: SIGKILL to one rank in the middle of training: torchrun exits with an error that names
    the rank and the signal, within a minute, and no rank is left behind."""
    log = tmp_path / "log"
    with started([*TORCHRUN, "megatron_opdlm.train", *arguments], log) as launcher:
        wait_for_steps(tmp_path / "run", 3, launcher, log)
        ranks = {child.environ().get("RANK"): child for child in launcher.children()}
        ranks["1"].send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=END_SECONDS) != 0
        assert "megatron_opdlm.train FAILED" in log.read_text()
        assert f"Signal 9 (SIGKILL) received by PID {ranks['1'].pid}" in log.read_text()
        assert not any(child.is_running() for child in ranks.values())
