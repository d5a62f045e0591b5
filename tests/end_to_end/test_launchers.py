"""The launch scripts start the ranks they say, on any node, and hand on signals and codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STUB = Path(__file__).parent / "slurm_stub"
PROGRAM = "tests.end_to_end.launched"
SECONDS = 900  # generous: the machine may be loaded
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
THIN = [s for s in SCRIPTS if s.name not in ("setup.sh", "quickstart.sh")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(argv: list[object], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(argument) for argument in argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code, text
    return text


def ranks(out: Path) -> list[dict]:
    files = sorted(out.glob("rank_*.json"))
    return [json.loads(file.read_text()) for file in files]


def assert_met(out: Path, world: int, local: int) -> None:
    found = ranks(out)
    assert [rank["sum"] for rank in found] == [world * (world + 1) // 2] * world
    assert [rank["RANK"] for rank in found] == [str(i) for i in range(world)]
    assert sorted(rank["LOCAL_RANK"] for rank in found) == sorted(
        str(i % local) for i in range(world)
    )
    assert {rank["OMP_NUM_THREADS"] for rank in found} == {"1"}


@pytest.mark.parametrize("script", THIN, ids=lambda path: path.name)
def test_scripts_are_thin_and_executable(script):
    assert len(script.read_text().splitlines()) <= 70
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], timeout=SECONDS).returncode == 0


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted(STUB.iterdir())], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [str(shellcheck), str(script)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["one_node.sh"], "no module to run"),
        (["one_node.sh", "--ranks"], "--ranks needs a value"),
        (["one_node.sh", "--rank", "2", "x"], "unknown option --rank"),
        (["one_node.sh", "--grace", "soon", "x"], "--grace soon"),
        (["many_nodes.sh", "--nodes", "2", "x"], "--nodes, --rendezvous and a module are needed"),
    ],
)
def test_wrong_options_are_one_line(argv, message):
    process = start([LAUNCH / argv[0], *argv[1:]])
    text = finish(process, code=2)
    assert text.startswith("error: ") and message in text and text.count("\n") == 1


def test_one_node(tmp_path):
    """Claim: that many ranks, and a log of each; they have ten minutes to save when stopped."""
    logs = tmp_path / "logs"
    argv = [LAUNCH / "one_node.sh", "--ranks", 2, "--logs", logs, PROGRAM, tmp_path]
    finish(start(argv))
    assert_met(tmp_path, 2, 2)
    said = sorted(file.read_text().strip() for file in logs.rglob("stdout.log"))
    assert said == ["rank 0 speaks", "rank 1 speaks"]
    assert {rank["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] for rank in ranks(tmp_path)} == {"600"}


def test_two_nodes_meet(tmp_path):
    """Claim: two "nodes" of one machine find each other at the rendezvous and form one job."""
    place = f"localhost:{free_port()}"
    argv = [LAUNCH / "many_nodes.sh", "--nodes", 2, "--rendezvous", place, "--ranks", 1]
    nodes = [start([*argv, "--id", "t", "--grace", 7, PROGRAM, tmp_path]) for _ in range(2)]
    for node in nodes:
        finish(node)
    assert_met(tmp_path, 2, 1)
    assert {rank["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] for rank in ranks(tmp_path)} == {"7"}


def slurm(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    (tmp_path / "out").mkdir()
    sizes = {"NTASKS": "2", "NTASKS_PER_NODE": "1", "JOB_NUM_NODES": "2", "JOB_ID": "4711"}
    environment = {"PATH": f"{STUB}:{os.environ['PATH']}", **environment}
    return start(
        [LAUNCH / "slurm.sbatch", PROGRAM, tmp_path / "out", *arguments],
        STUB_CALLS=str(tmp_path / "calls"),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="node[1-2]",
        OPDLM_LOGS=str(tmp_path / "logs"),
        OPDLM_PORT=str(free_port()),
        **{f"SLURM_{name}": value for name, value in sizes.items()},
        **environment,
    )


def test_slurm_starts_a_rank_a_task_in_the_image(tmp_path):
    """Claim: ranks meet at the first node and run the image's python, each has its log, the image
    and the mounts reach srun; a job that ends well is not queued again."""
    python = tmp_path / "image" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho used >>"$STUB_CALLS.python"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{STUB}:{os.environ['PATH']}"
    job = slurm(tmp_path, OPDLM_IMAGE="opdlm.sqsh", OPDLM_SRUN="--mpi=none --label", PATH=path)
    text = finish(job)
    assert_met(tmp_path / "out", 2, 1)
    assert (tmp_path / "calls.python").read_text() == "used\n" * 2
    assert "rank 0 speaks" in text and "rank 1 speaks" not in text
    logs = tmp_path / "logs" / "4711"
    assert "rank 0 speaks" in (logs / "rank_00000.log").read_text()
    assert "rank 1 speaks" in (logs / "rank_00001.log").read_text()
    calls = (tmp_path / "calls").read_text()
    for option in ("--container-image=opdlm.sqsh", f"--container-mounts={ROOT}:{ROOT}", "--label"):
        assert option in calls
    assert "requeue" not in calls


def test_slurm_queues_a_stopped_job_again(tmp_path):
    """Claim: Slurm's warning reaches every rank, and their code 75 queues the job again."""
    job = slurm(tmp_path, "--until-signal", "--code", "75")
    end = time.monotonic() + SECONDS
    while len(ranks(tmp_path / "out")) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    finish(job, code=75)
    assert "scontrol requeue 4711" in (tmp_path / "calls").read_text()


@pytest.mark.slow
def test_a_task_a_node_starts_many_nodes(tmp_path):
    """Claim: the pipeline's launcher for many nodes (docs/launching.md) forms one job."""
    argv = [STUB / "srun", "--nodes=2", "--ntasks-per-node=1", "launch/many_nodes.sh"]
    place = {"OPDLM_NODES": "2", "OPDLM_RENDEZVOUS": f"localhost:{free_port()}"}
    sizes = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "STUB_CALLS": str(tmp_path / "c")}
    finish(start([*argv, "--ranks", "1", PROGRAM, tmp_path], **place, **sizes))
    assert_met(tmp_path, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "state"), [("1", "RUNNING"), ("75", "CANCELLED")])
def test_slurm_leaves_failed_and_cancelled_jobs_alone(tmp_path, code, state):
    finish(slurm(tmp_path, "--code", code, STUB_STATE=state), code=int(code))
    assert "requeue" not in (tmp_path / "calls").read_text()
