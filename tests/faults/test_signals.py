"""A request to stop (SIGTERM, SIGUSR1, the death of the launcher) saves the last finished step and
leaves with exit code 75; started again, the run gives the undisturbed run's numbers.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_opdlm.errors import STOPPED
from tests import training_run
from tests.end_to_end.test_rank_death import TORCHRUN, started, wait_for_steps
from tests.faults.conftest import Job
from tests.faults.disturbed import Disturbance
from tests.training_run import STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SESSION = "megatron_opdlm.run.session"
NEVER = "checkpoint.every=1000"
SECONDS_APART = 20  # the watchdog's grace is 5
Jobs = Callable[..., Job]


def checkpoints(out: Path) -> list[str]:
    """Names of what was published, the newest last."""
    return sorted(path.name for path in (out / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("action", "function", "call", "rank", "saved"),
    [
        ("terminate", f"{SESSION}:generate_over_copies", 4, 1, 3),
        # between two forwards of the rollout, which is given up
        ("warn", "megatron_opdlm.rollout:_Engine._launch", 20, 0, None),
        # a step whose weights have begun to change is finished first
        ("terminate", "megatron_opdlm.update:update", 8, 1, 3),
    ],
)
def test_asked_to_stop(
    job: Jobs, undisturbed, action: str, function: str, call: int, rank: int, saved: int | None
):
    """Claim: one signal to one of two ranks: both leave with code 75 at the same point, with a
    checkpoint of the last finished step and one line that says so; the same command goes on and
    gives the undisturbed run's numbers."""
    asked = job(2)
    disturbance = Disturbance(function=function, call=call, action=action, rank=rank)
    ended = asked(NEVER, disturbance=disturbance)
    assert [one.code for one in ended] == [STOPPED, STOPPED], [one.log for one in ended]
    done = len(training_run.metrics(asked.out))
    assert 0 < done < STEPS
    assert saved is None or done == saved
    assert checkpoints(asked.out) == [f"step_{done:07d}"]
    name = "SIGTERM" if action == "terminate" else "SIGUSR1"
    (line,) = ended[0].errors
    assert line.startswith(f"stopped: by {name}") or "another rank" in line
    assert f"step {done} is saved" in line
    assert ended[1].errors == []
    assert asked.continued() == undisturbed


def test_nothing_is_saved_twice(job: Jobs):
    """Claim: a request before the first step has ended saves nothing; one right after a save leaves
    the checkpoint as it is."""
    asked = job(2, "checkpoint.every=2")
    early = Disturbance(function=f"{SESSION}:generate_over_copies", call=1, action="terminate")
    first, _ = asked(disturbance=early)
    assert first.code == STOPPED
    assert "no step was finished" in first.errors[0]
    assert checkpoints(asked.out) == []
    again = Disturbance(function=f"{SESSION}:generate_over_copies", call=3, action="terminate")
    first, _ = asked(disturbance=again)
    assert first.code == STOPPED and "step 2 is saved" in first.errors[0]
    (saved,) = (asked.out / "checkpoints").glob("step_*")
    before = saved.stat().st_ino, (saved / "manifest.json").stat().st_mtime_ns
    first, _ = asked(disturbance=early)  # in step 3, which is the first of this start
    assert first.code == STOPPED and "step 2 is saved" in first.errors[0]
    assert (saved.stat().st_ino, (saved / "manifest.json").stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        ("build_plan", 1),  # before the ranks know of each other
        ("build_student", 1),
        ("build_student", 0),
        ("build_student", None),
        ("MetricsWriter", 0),  # the other rank may have begun its steps
    ],
)
def test_a_signal_during_set_up(job: Jobs, function: str, rank: int | None):
    """Claim: a signal to one rank or to all before the first step: all leave at once with the same
    code, and one line says so, whoever was asked."""
    asked = job(2)
    disturbance = Disturbance(
        function=f"megatron_opdlm.run.opening:{function}", call=1, action="terminate", rank=rank
    )
    ended = asked(disturbance=disturbance)
    assert [one.code for one in ended] == [STOPPED, STOPPED], [one.log[-3000:] for one in ended]
    who = " to rank 1" if rank == 1 else ""
    expected = f"stopped: by SIGTERM{who} during set-up; the same command starts again"
    assert ended[0].errors == [expected]
    assert ended[1].errors == []
    assert max(one.when for one in ended) - min(one.when for one in ended) < SECONDS_APART


@pytest.mark.slow
def test_torchrun_starts_again(job: Jobs, undisturbed, tmp_path: Path):
    """Claim: ``torchrun --max-restarts`` takes code 75 for a reason to start its ranks again, which
    go on from what was saved to the undisturbed run's numbers."""
    asked, log = job(2, NEVER), tmp_path / "log"
    fault = {"function": f"{SESSION}:generate_over_copies", "call": 4, "action": "warn", "rank": 1}
    restarting = [*TORCHRUN[:-1], "--max-restarts=1", "-m", "tests.faults.disturbed"]
    with started([*restarting, *asked.arguments], log, FAULT=json.dumps(fault)) as launcher:
        assert launcher.wait(timeout=600) == 0, log.read_text()[-3000:]
    assert "resuming after step 3" in log.read_text()
    assert training_run.metrics(asked.out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_launcher_is_asked_to_stop(job: Jobs, tmp_path: Path, number: signal.Signals):
    """Claim: torchrun passes SIGTERM on and its ranks save before it ends; where it is killed
    itself, they notice, save and leave, and no rank is left."""
    endless = ["train.steps=100000", "data.epochs=100000", NEVER]
    asked, log = job(2, *endless), tmp_path / "log"
    command = [*TORCHRUN, "megatron_opdlm.train", *asked.arguments]
    with started(command, log) as launcher:
        wait_for_steps(asked.out, 3, launcher, log)
        ranks = launcher.children()
        os.kill(launcher.pid, number)
        assert launcher.wait(timeout=300) != 0
        psutil.wait_procs(ranks, timeout=300)
        assert not any(rank.is_running() for rank in ranks)
    done = len(training_run.metrics(asked.out))
    assert checkpoints(asked.out) == [f"step_{done:07d}"]
    assert f"step {done} is saved" in log.read_text()
