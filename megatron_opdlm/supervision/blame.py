"""Which of the ranks that get nowhere is to blame, where a wait for others cannot be seen.

On GPUs a collective call only queues its work. A rank that waits for others then stands in an
ordinary line of Python, such as ``x.cpu()``, like one that hangs. But it waits only if it has made
a call in some group that another member has not made yet. (NCCL does not count what is sent from
one pipeline stage to the next, so a stage that waits for such a message is named beside the one
that hangs.)
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch.distributed as dist

Calls = Mapping[str, int]  # process group -> collective calls made in it


def calls_made() -> Calls:
    """How many collective calls this rank has made, or queued, in each of its process groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


@dataclass(frozen=True)
class Stuck:
    """A rank that has got nowhere for too long."""

    seconds: float
    doing: str
    place: str  # in the code

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Self | None:
        return None if content is None else cls(**content)


def to_blame(stuck: Mapping[int, Stuck], calls: Mapping[int, Calls]) -> list[int]:
    """Those stuck ranks that wait for nobody: in no group have they made a call that another member
    has not made. ``calls`` of every rank.
    """
    return sorted(rank for rank in stuck if not _waits(rank, calls))


def _waits(rank: int, calls: Mapping[int, Calls]) -> bool:
    return any(
        other[group] < made
        for group, made in calls[rank].items()
        for other in calls.values()
        if group in other
    )


def described(blamed: list[int], stuck: Mapping[int, Stuck]) -> str:
    """Who gets nowhere, and where."""
    first = stuck[blamed[0]]
    if len(blamed) == 1:
        return (
            f"rank {blamed[0]} has got nowhere for {first.seconds:.0f} s in {first.doing}, "
            f"at {first.place}"
        )
    places = [f"rank {rank} in {stuck[rank].doing}, at {stuck[rank].place}" for rank in blamed]
    return (
        f"ranks {', '.join(map(str, blamed))} have got nowhere for {first.seconds:.0f} s, and none "
        f"is known to wait for another ({'; '.join(places)})"
    )
