"""Jobs that end badly. Imports nothing heavy, so a group for them starts at once."""

import os
import signal
import time

FOREVER = 60.0  # seconds that the other ranks wait, as in a collective


def rank() -> int:
    """This rank's number."""
    return int(os.environ["RANK"])


def fail(bad_rank: int) -> None:
    """One rank raises, the others wait for it."""
    if rank() == bad_rank:
        print("last words on the terminal", flush=True)
        raise ValueError("as the test asked")
    time.sleep(FOREVER)


def die(bad_rank: int) -> None:
    """One rank leaves without a word, the others wait for it."""
    if rank() == bad_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER)


def sleep(seconds: float) -> None:
    """Do nothing for a while."""
    time.sleep(seconds)
