"""One job at a time in a run directory."""

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from megatron_opdlm import parallel
from megatron_opdlm.errors import InputError
from megatron_opdlm.supervision import activity
from megatron_opdlm.supervision.agreement import first_problem

LOCK = ".lock"
# For a job that is leaving (what a killed launcher started saves first), and for a file server to
# notice that a node is gone (NFS: 90 seconds).
WAIT_SECONDS = 180
_POLL_SECONDS = 0.2
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without locks
_held: dict[str, int] = {}  # descriptors: the system lets go of the lock when this process ends


def hold_run_directory(
    out: Path, *, create: bool = False, wait_seconds: float = WAIT_SECONDS
) -> None:
    """Keep every other job out of ``out`` until this process ends; all ranks call it. Without
    ``create`` a directory that is not there yet is left to a later call.

    Raises InputError, on all ranks, where another job still works there after ``wait_seconds``.
    """
    problem = None
    is_needed = (create or out.is_dir()) and os.path.realpath(out) not in _held
    if parallel.is_writer() and is_needed:
        try:
            problem = _take(out, wait_seconds)
        except OSError as error:
            problem = f"train.out={out} cannot be written to: {error}; choose another directory"
    problem = first_problem(problem)
    if problem is not None:
        raise InputError(problem)


def _take(out: Path, wait_seconds: float) -> str | None:
    """The lock, or what is in its way."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    end, is_announced = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unnamed"
            if time.monotonic() > end:
                os.close(descriptor)
                return (
                    f"train.out={out}: another job works there ({holder}); wait for it or end it, "
                    "or use another directory"
                )
            if not is_announced:
                text = f"train.out={out}: waiting for {holder} to leave, {wait_seconds:g} s at most"
                print(text, file=sys.stderr, flush=True)
                is_announced = True
            activity.advance()
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                break  # nothing to be had here
            raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[os.path.realpath(out)] = descriptor
    return None
