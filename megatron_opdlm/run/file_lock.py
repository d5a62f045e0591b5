"""A file that one process at a time may hold, until it ends: the system lets go of it then."""

import fcntl
import sys
import time
from collections.abc import Callable

_POLL_SECONDS = 0.2


def wait_for_lock(
    descriptor: int,
    seconds: float,
    notice: str,
    while_waiting: Callable[[], object] = lambda: None,
) -> bool:
    """Lock an open file; False where another process still holds it after ``seconds``. ``notice``
    goes to standard error once if it has to wait. OSError where the file system has no locks.
    """
    end, is_announced = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        if not is_announced:
            print(
                f"{notice}; waiting for its end, {seconds:g} s at most", file=sys.stderr, flush=True
            )
            is_announced = True
        while_waiting()
        time.sleep(_POLL_SECONDS)
