"""A process with everything imported that a jail's trusted process needs, forked for each jail: a
start of Python with these imports takes three times as long as all the rest of a jail.

It holds no program, no test and no descriptor of any jail, so a fork of it knows what a new
interpreter knows.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

_PID_BYTES = 8


class Prepared:
    """One such process; ended when the last descriptor to it closes, so also by our death."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.door, theirs = socket.socketpair()
        script = Path(__file__).with_name("process.py")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(script), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def fork(self, control: int, errors: int) -> int:
        """The process id of a new jail's first process, which takes copies of both descriptors and
        leads a process group. OSError: there is none.
        """
        socket.send_fds(self.door, [b"+"], [control, errors])
        answer = self.door.recv(_PID_BYTES, socket.MSG_WAITALL)
        if len(answer) < _PID_BYTES:
            raise ConnectionError("the process that jails are forked from has ended")
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        """End it; running jails go on."""
        self.door.close()
        if self.owner == os.getpid():
            self.process.wait()


_prepared: Prepared | None = None
_lock = threading.Lock()


def fork_jail(control: int, errors: int) -> int:
    """``Prepared.fork`` of this process' own; a new one after one that failed."""
    global _prepared
    with _lock:
        if _prepared is not None and _prepared.owner != os.getpid():
            _prepared = None  # ours is a copy of another grader's door
        if _prepared is None:
            _prepared = Prepared()
        try:
            return _prepared.fork(control, errors)
        except OSError:
            _prepared.process.kill()
            close()
            raise


def close() -> None:
    """End this process' own, if there is one; the next jail starts another."""
    global _prepared
    if _prepared is not None:
        _prepared.close()
        _prepared = None


atexit.register(close)


def serve(door: socket.socket) -> tuple[int, int] | None:
    """Fork for each pair of descriptors that comes: the pair in a fork, None when the grader has
    gone.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(door, 1, 2)
        _reap()
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            door.close()
            os.setsid()
            control, errors = descriptors
            return control, errors
        for descriptor in descriptors:
            os.close(descriptor)
        door.sendall(pid.to_bytes(_PID_BYTES, "little"))


def _reap() -> None:
    """Collect the jails that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
