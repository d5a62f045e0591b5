"""Requests to stop: SIGTERM (launchers, schedulers, pre-emption) and SIGUSR1 (Slurm's
``--signal=USR1@seconds``).

During set-up nothing is worth saving and the process stops at once, as soon as the other ranks can
be told (``watchdog.py``). Afterwards a request waits for the next safe point, where all ranks agree
on it, save and leave with exit code 75: the same command continues.
"""

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_opdlm.errors import Stopped
from megatron_opdlm.launcher import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Requests:
    """State of this process, read and written by the signal handler."""

    are_heard: bool = False
    reason: str | None = None
    stops_at_once: bool = True
    in_set_up: bool = True


@contextmanager
def listening() -> Iterator[None]:
    """Take the signals during the body; outside the main thread, where Python cannot, and inside
    another such body do nothing.

    Children forked meanwhile, such as the writers of a checkpoint, do not take them: a scheduler
    signals the whole family, and what a child writes is still needed. Once the body has ended they
    do, so that they can be terminated.
    """
    if _Requests.are_heard:
        yield
        return
    _Requests.reason, _Requests.in_set_up = None, True
    _Requests.stops_at_once = world_size() == 1
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, ended = os.getpid(), mmap.mmap(-1, 1)  # shared with the children

    def take(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            request(signal.Signals(number).name)
            if _Requests.stops_at_once:
                raise stop_in_set_up()
        elif number == signal.SIGTERM and ended[0]:
            os._exit(128 + number)

    before = {number: signal.signal(number, take) for number in SIGNALS}
    _Requests.are_heard = True
    try:
        yield
    finally:
        _Requests.are_heard = False
        ended[0] = 1
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once() -> None:
    """From now on a request ends the set-up: the other ranks can be told. Raises Stopped where one
    has been waiting for that.
    """
    _Requests.stops_at_once = True
    if requested():
        raise stop_in_set_up()


def wait_for_safe_points() -> None:
    """From now on a request waits until somebody asks ``requested``."""
    _Requests.stops_at_once = _Requests.in_set_up = False


def in_set_up() -> bool:
    """Whether the first step has not begun."""
    return _Requests.in_set_up


def stop_in_set_up(rank: int = 0) -> Stopped:
    """The end of a run that has not begun, as the rank that was asked (if not 0) tells others."""
    whom = f" to rank {rank}" if rank else ""
    return Stopped(f"by {reason()}{whom} during set-up; the same command starts again")


def request(reason: str) -> None:
    """Ask this rank to stop; the first reason stays."""
    _Requests.reason = _Requests.reason or reason


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _Requests.reason is not None


def reason() -> str:
    """Who asked, for the last words of the run."""
    return _Requests.reason or "a request to another rank"
