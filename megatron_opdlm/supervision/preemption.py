"""Requests to stop: SIGTERM (launchers, schedulers, pre-emption) and SIGUSR1 (Slurm's
``--signal=USR1@seconds``).

During set-up nothing is worth saving and the process stops at once. Afterwards a request waits for
the next safe point, where all ranks agree on it, save and leave with exit code 75: the same command
continues.
"""

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_opdlm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Requests:
    """State of this process, read and written by the signal handler."""

    reason: str | None = None
    can_wait: bool = False


@contextmanager
def listening() -> Iterator[None]:
    """Take the signals during the body; outside the main thread, where Python cannot, do nothing.

    Children forked meanwhile, such as the writers of a checkpoint, do not take them: a scheduler
    signals the whole family, and what a child writes is still needed. Once the body has ended they
    do, so that they can be terminated.
    """
    _Requests.reason, _Requests.can_wait = None, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, ended = os.getpid(), mmap.mmap(-1, 1)  # shared with the children

    def take(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            request(signal.Signals(number).name)
            if not _Requests.can_wait:
                raise Stopped(f"by {_Requests.reason} during set-up; the same command starts again")
        elif number == signal.SIGTERM and ended[0]:
            os._exit(128 + number)

    before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield
    finally:
        ended[0] = 1
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_safe_points() -> None:
    """From now on a request waits until somebody asks ``requested``."""
    _Requests.can_wait = True


def request(reason: str) -> None:
    """Ask this rank to stop; the first reason stays."""
    _Requests.reason = _Requests.reason or reason


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _Requests.reason is not None


def reason() -> str:
    """Who asked, for the last words of the run."""
    return _Requests.reason or "a request to another rank"
