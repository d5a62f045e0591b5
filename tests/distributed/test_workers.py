"""The test harness itself: whatever goes wrong on a rank is a failed test, never a hang."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import misbehaviour
from tests.distributed.workers import RanksFailed, WorkerGroups
from tests.forking import ForkServer

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def light_ranks() -> Iterator[WorkerGroups]:
    """Groups that have not imported torch."""
    server = ForkServer(["tests.distributed.misbehaviour"])
    groups = WorkerGroups(server)
    yield groups
    groups.close()
    server.close()


def test_results_come_by_rank_and_the_group_is_kept(light_ranks: WorkerGroups):
    """Claim: each rank runs the job under torchrun's environment; one group serves all jobs."""
    group = light_ranks(3)
    for _ in range(2):
        assert group.run(misbehaviour.rank) == [0, 1, 2]
        assert light_ranks(3) is group


def test_ranks_rest_between_jobs(light_ranks: WorkerGroups):
    """Claim: ranks take no time between two jobs, and the next job wakes them."""
    group = light_ranks(2)
    for _ in range(2):
        assert group.run(misbehaviour.rank) == [0, 1]
        deadline = time.monotonic() + misbehaviour.FOREVER
        while any(_state(process) != "T" for process in group.process_ids):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _state(process: int) -> str:
    """As /proc has it: T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


RAISED = r"(?s)fail failed.*rank 1: .*ValueError: as the test"
SILENT = r"(?s)rank 0, its output:\nlast words.*rank 1: gave no answer"


@pytest.mark.parametrize(
    ("job", "arguments", "story"),
    [
        pytest.param(misbehaviour.fail, {"bad_rank": 1}, RAISED, id="an exception"),
        pytest.param(misbehaviour.fail, {"bad_rank": 0}, SILENT, id="the others' silence"),
        pytest.param(misbehaviour.die, {"bad_rank": 1}, "died with exit code -9", id="death"),
        pytest.param(
            misbehaviour.sleep, {"seconds": 60.0, "timeout": 0.5}, r"in 0\.5 seconds", id="no end"
        ),
    ],
)
def test_every_way_to_fail_ends_the_job_and_the_group(
    light_ranks: WorkerGroups, job: Callable[..., Any], arguments: dict[str, Any], story: str
):
    """Claim: an exception, a death and a job without end each fail within seconds, with the rank's
    words, leave no process behind, and the next job gets a fresh group."""
    group = light_ranks(2)
    processes = group.process_ids
    started = time.monotonic()
    with pytest.raises(RanksFailed, match=story):
        group.run(job, **arguments)
    assert time.monotonic() - started < misbehaviour.FOREVER / 2
    assert not group.alive
    assert not any(_exists(process) for process in processes)
    assert light_ranks(2).run(misbehaviour.rank) == [0, 1]


def test_a_rank_that_died_between_jobs_is_noticed(light_ranks: WorkerGroups):
    """Claim: a group that lost a rank is replaced, not used."""
    group = light_ranks(2)
    os.kill(group.process_ids[1], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while group.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert light_ranks(2) is not group
    assert light_ranks(2).run(misbehaviour.rank) == [0, 1]


def _exists(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
