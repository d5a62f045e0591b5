"""Groups of ranks, shared by all tests of a session."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import WorkerGroups


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerGroups]:
    """``ranks(2).run(function, **arguments)``: a function on both ranks of a running group."""
    groups = WorkerGroups()
    yield groups
    groups.close()
