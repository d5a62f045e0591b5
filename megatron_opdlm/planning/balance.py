"""Sharing sequences out: over model replicas by cost, over microbatches by tokens. Pure functions
of numbers, so that every rank that knows the lengths comes to the same answer.
"""

from collections.abc import Hashable, Sequence


def share_out(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Split items 0, 1, ... into ``parts`` lists of about equal total cost, each in rising order.

    Costliest first, each to the part that has least so far: no part costs more than the lightest
    and one item (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    load = [0.0] * parts
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(parts), key=lambda part: (load[part], part))
        shares[lightest].append(item)
        load[lightest] += costs[item]
    return [sorted(share) for share in shares]


def share_out_alike(
    costs: Sequence[float], alike: Sequence[Hashable], saved: Sequence[float], parts: int
) -> list[list[int]]:
    """``share_out`` where an item costs ``saved[i]`` less in a part that has another one ``alike``
    it: these stay together unless the parts' costs become so unequal that the largest grows.
    """
    together: dict[Hashable, list[int]] = {}
    for item, kind in enumerate(alike):
        together.setdefault(kind, []).append(item)
    units = list(together.values())
    of_unit = [sum(costs[i] for i in unit) - sum(saved[i] for i in unit[1:]) for unit in units]
    apart, shares = share_out(costs, parts), share_out(of_unit, parts)
    if _largest(shares, of_unit) > _largest(apart, costs):
        return apart
    return [sorted(item for unit in share for item in units[unit]) for share in shares]


def _largest(shares: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    return max(sum(costs[i] for i in share) for share in shares)


def fill_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Split items into few bins that hold at most ``capacity``; an item that is larger has a bin
    for itself. No items: one empty bin.

    First-fit decreasing finds the number of bins. Where as many bins of about equal fill also keep
    the capacity, those are taken: the largest microbatch decides the memory.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = next((b for b, left in enumerate(room) if left >= sizes[item]), None)
        if fitting is None:
            bins.append([])
            room.append(capacity)
            fitting = len(bins) - 1
        bins[fitting].append(item)
        room[fitting] -= sizes[item]
    even = share_out(sizes, len(bins))
    if all(len(one) == 1 or sum(sizes[i] for i in one) <= capacity for one in even):
        return even or [[]]
    return bins
