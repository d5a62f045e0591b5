"""A job that cannot go on ends: all ranks leave with exit code 1 within the time-out and say which
rank failed, in which phase; the same command then continues to the undisturbed run's numbers.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import training_run
from tests.distributed.workers import WorkerGroups
from tests.faults import disturbed
from tests.faults.conftest import Job
from tests.faults.disturbed import Disturbance

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ROLLOUT = "megatron_opdlm.run.session:generate_over_copies"
UPDATE = "megatron_opdlm.update:update"
TIMEOUT_SECONDS = 12
SHORT = f"distributed.timeout_seconds={TIMEOUT_SECONDS}"
Jobs = Callable[..., Job]


@pytest.mark.parametrize(
    ("rank", "function", "call", "phase"),
    [
        (1, ROLLOUT, 4, "rollout of step 4"),
        (0, UPDATE, 11, "update of step 4"),  # three updates a step
    ],
)
def test_a_killed_rank(job: Jobs, undisturbed, rank: int, function: str, call: int, phase: str):
    """Claim: SIGKILL to a rank, rank 0 or another, without a launcher that would stop the others:
    the other one names it and its phase in one error line and leaves with code 1; the same command
    goes on to the undisturbed run's numbers."""
    killed = job(2)
    disturbance = Disturbance(function=function, call=call, action="kill", rank=rank)
    ended = killed(disturbance=disturbance)
    other = ended[1 - rank]
    assert ended[rank].code == -9
    assert other.code == 1, other.log
    (error,) = other.errors
    assert f"rank {rank} has died in phase {phase}" in error
    assert "Traceback" not in other.log
    assert killed.continued() == undisturbed


def test_a_stopped_rank(job: Jobs, forks: WorkerGroups):
    """Claim: SIGSTOP to a rank: the other one leaves within the time-out (with room for a busy
    machine) and names it and its phase; continued, the stopped rank does not train on alone."""
    stopping = job(2, SHORT)
    disturbance = Disturbance(function=ROLLOUT, call=3, action="stop", rank=1)
    first, second = stopping(disturbance=disturbance)
    assert second.code is None
    assert first.code == 1, first.log
    (error,) = first.errors
    assert "rank 1 has not been heard of for" in error and "in phase rollout of step 3" in error
    assert f"distributed.timeout_seconds={TIMEOUT_SECONDS}" in error
    assert first.when - second.when < 3 * TIMEOUT_SECONDS
    codes = forks(2).run(disturbed.wake, process=second.process, only_rank=1, timeout=120)
    assert codes == [None, 1]
    assert "step 3 is saved" not in Path(second.log_file).read_text()


def test_a_rank_stopped_for_a_while(job: Jobs, undisturbed):
    """Claim: a rank that is stopped for less than the time-out disturbs nothing."""
    pausing = job(2)
    disturbance = Disturbance(function=UPDATE, call=7, action="stop", rank=1)
    ended = pausing(disturbance=disturbance, pause_seconds=2.0)
    assert [one.code for one in ended] == [0, 0], ended
    assert training_run.metrics(pausing.out) == undisturbed


def test_a_rank_in_an_endless_loop(job: Jobs):
    """Claim: a rank that is alive but gets nowhere is named with its phase and its place in the
    code; the one that waits for it in a collective is not."""
    looping = job(2, SHORT)
    disturbance = Disturbance(function=UPDATE, call=5, action="loop", rank=1)
    ended = looping(disturbance=disturbance)
    for one in ended:
        assert one.code == 1, one.log
        (error,) = one.errors
        assert "rank 1 has got nowhere for" in error
        assert "in phase update of step 2, at megatron_opdlm/train.py:" in error


def test_a_rank_in_an_endless_loop_on_a_gpu(job: Jobs):
    """Claim: the same where a rank that waits looks like one that hangs, since its collective call
    is only queued and it waits in a line of its own: the one that made fewer calls is named."""
    looping = job(2, SHORT)
    disturbance = Disturbance(function=UPDATE, call=5, action="loop unseen", rank=None)
    ended = looping(disturbance=disturbance)
    for one in ended:
        assert one.code == 1, one.log
        (error,) = one.errors
        assert "rank 1 has got nowhere for" in error, error


def test_a_rank_with_a_mistake(job: Jobs):
    """Claim: an exception on one rank ends the others with its text, at once."""
    failing = job(2)
    disturbance = Disturbance(function=ROLLOUT, call=2, action="fail", rank=1)
    first, second = failing(disturbance=disturbance)
    mistake = "a mistake that nobody foresaw"
    assert (first.code, second.code) == (1, 1)
    assert first.errors == [f"error: rank 1 failed in phase rollout of step 2: {mistake}"]
    assert second.errors == [f"error: rank 1: unexpected ValueError: {mistake}"]
    assert "Traceback" in second.log
