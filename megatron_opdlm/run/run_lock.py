"""One job at a time in a run directory."""

import errno
import os
import socket
from pathlib import Path

from megatron_opdlm import parallel
from megatron_opdlm.errors import InputError
from megatron_opdlm.run.file_lock import wait_for_lock
from megatron_opdlm.supervision import activity

LOCK = ".lock"
# For a job that is leaving (what a killed launcher started saves first), and for a file server to
# notice that a node is gone (NFS: 90 seconds).
WAIT_SECONDS = 180
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without locks
_held: dict[str, int] = {}  # descriptors: the system lets go of the lock when this process ends


def hold_run_directory(
    out: Path, *, create: bool = False, wait_seconds: float = WAIT_SECONDS
) -> None:
    """Keep every other job out of ``out`` until this process ends; all ranks call it. Without
    ``create`` a directory that is not there yet is left to a later call.

    Raises InputError, on all ranks, where another job still works there after ``wait_seconds``.
    """

    def take() -> str | None:
        if not (create or out.is_dir()) or os.path.realpath(out) in _held:
            return None
        try:
            return _take(out, wait_seconds)
        except OSError as error:
            return f"train.out={out} cannot be written to: {error}; choose another directory"

    problem = parallel.on_writer(take)
    if problem is not None:
        raise InputError(problem)


def _take(out: Path, wait_seconds: float) -> str | None:
    """The lock, or what is in its way."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unnamed"
    notice = f"train.out={out}: another job works there ({holder})"
    try:
        is_ours = wait_for_lock(descriptor, wait_seconds, notice, activity.advance)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        is_ours = True  # nothing to be had here
    if not is_ours:
        os.close(descriptor)
        return f"{notice}; wait for it or end it, or use another directory"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[os.path.realpath(out)] = descriptor
    return None
