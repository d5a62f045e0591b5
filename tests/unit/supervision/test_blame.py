"""Of ranks that get nowhere, those are to blame that wait for nobody."""

import pytest

from megatron_opdlm.supervision.blame import Stuck, described, to_blame

WORLD, FIRST, SECOND = "world", "ranks 0 and 1", "ranks 2 and 3"


def stuck(*ranks: int) -> dict[int, Stuck]:
    return {rank: Stuck(9.0, "phase update of step 2", f"file.py:{rank}") for rank in ranks}


CALLS = {
    0: {WORLD: 5, FIRST: 3},
    1: {WORLD: 5, FIRST: 3},
    2: {WORLD: 5, SECOND: 3},
    3: {WORLD: 5, SECOND: 3},
}


@pytest.mark.parametrize(
    ("behind", "idle", "blamed"),
    [
        # 3 hangs before a call of its pair; the other pair has gone on to one of all
        ({0: {WORLD: 6}, 1: {WORLD: 6}, 2: {SECOND: 4}}, (0, 1, 2, 3), [3]),
        # the same while 3 still works: nobody is to blame for waiting
        ({0: {WORLD: 6}, 1: {WORLD: 6}, 2: {SECOND: 4}}, (0, 1, 2), []),
        # 2 waits for 3, and has another call before it that nobody made: 3 is to blame
        ({0: {WORLD: 6}, 2: {SECOND: 4}, 1: {WORLD: 6}}, (2, 3), [3]),
        # all have made the same calls and none ends
        ({}, (0, 1, 2, 3), [0, 1, 2, 3]),
        # one hangs while the others work on, and owes nobody a call yet
        ({}, (1,), [1]),
    ],
)
def test_who_waits_is_not_to_blame(
    behind: dict[int, dict[str, int]], idle: tuple[int, ...], blamed: list[int]
):
    calls = {rank: made | behind.get(rank, {}) for rank, made in CALLS.items()}
    assert to_blame(stuck(*idle), calls) == blamed


def test_the_words():
    """Claim: one is named with its place, several with theirs."""
    one = described([3], stuck(2, 3))
    assert one == "rank 3 has got nowhere for 9 s in phase update of step 2, at file.py:3"
    several = described([2, 3], stuck(2, 3))
    assert several.startswith("ranks 2, 3 have got nowhere for 9 s")
    assert "rank 2 in phase update of step 2, at file.py:2; rank 3" in several


def test_a_message_reads_back():
    (one,) = stuck(1).values()
    assert Stuck.from_json(one.to_json()) == one
    assert Stuck.from_json(None) is None
