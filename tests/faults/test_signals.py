"""A request to stop (SIGTERM, SIGUSR1, the death of the launcher) saves the last finished step and
leaves with exit code 75; started again, the run gives the undisturbed run's numbers.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_opdlm.errors import STOPPED
from tests import training_run
from tests.distributed.workers import REPOSITORY
from tests.end_to_end.test_rank_death import TORCHRUN, started
from tests.faults.conftest import Job
from tests.faults.disturbed import Disturbance
from tests.training_run import STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SESSION = "megatron_opdlm.session"
NEVER = "checkpoint.every=1000"
Jobs = Callable[..., Job]


def checkpoints(out: Path) -> list[str]:
    """Names of what was published, the newest last."""
    return sorted(path.name for path in (out / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("action", "function", "call", "rank", "saved"),
    [
        ("terminate", f"{SESSION}:generate", 4, 1, 3),
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
    """Claim: a request right after a save leaves the checkpoint as it is; one before the first step
    has ended saves nothing."""
    asked = job(1, "checkpoint.every=2")
    early = Disturbance(function=f"{SESSION}:generate", call=1, action="terminate")
    (ended,) = asked(disturbance=early)
    assert ended.code == STOPPED
    assert "no step was finished" in ended.errors[0]
    assert checkpoints(asked.out) == []
    again = Disturbance(function=f"{SESSION}:generate", call=3, action="terminate")
    count = Disturbance(
        function="megatron_opdlm.checkpoint:Checkpoints.save", call=2, action="fail"
    )
    (ended,) = asked(disturbance=again)
    assert ended.code == STOPPED and "step 2 is saved" in ended.errors[0]
    (ended,) = asked(disturbance=count)  # its second save would fail; it needs none to stop
    assert ended.code == 1 and checkpoints(asked.out) == ["step_0000002", "step_0000004"]


def test_a_signal_during_set_up(job: Jobs):
    """Claim: before the first step the run leaves at once, with the same code."""
    asked = job(1)
    disturbance = Disturbance(function=f"{SESSION}:build_student", call=1, action="terminate")
    (ended,) = asked(disturbance=disturbance)
    assert ended.code == STOPPED
    assert ended.errors == ["stopped: by SIGTERM during set-up; the same command starts again"]
