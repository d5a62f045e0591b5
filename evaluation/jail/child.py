"""Processes of a jail: forked from its trusted process, confined, watched, ended.

Standard library only.
"""

import _sitebuiltins
import builtins
import contextlib
import fcntl
import io
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from evaluation.jail import isolation

_READY_SECONDS = 120.0  # for a forked child to confine itself, on however busy a machine
_ENDING_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What confines the programs of one jail."""

    limits: isolation.Limits
    layers: set[str]
    trees: list[str]  # readable: the interpreter and its packages
    work: str  # writable


class ProgramEnded(BaseException):
    """Unwinds a forked child to the top, where the interpreter ends as it always does."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class SetUpFailed(Exception):
    """A child could not be confined: a fault of the machine, never of the program."""


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all its threads (the clock of ``clock_getcpuclockid(3)``)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


class Child:
    """A confined process. Its time runs from the moment it is ready, not from its creation."""

    def __init__(self, cell: Cell, body: Callable[[], int], keep: dict[int, int]) -> None:
        """Fork; ``keep``: descriptor numbers in the child -> descriptors here."""
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(cell, body, keep, told)
        os.close(told)
        self.status: int | None = None
        self.used = 0.0
        self._await(ready)
        self.cpu_start, self.wall_start = cpu_seconds(self.pid), time.monotonic()

    def _become(
        self, cell: Cell, body: Callable[[], int], keep: dict[int, int], told: int
    ) -> NoReturn:
        try:
            os.setsid()
            rearrange({**keep, max(keep) + 1: told})
            told = max(keep) + 1
            isolation.confine(cell.limits, cell.layers, cell.trees, cell.work)
            os.chdir(cell.work)
        except BaseException as error:
            os.write(told, f"{type(error).__name__}: {error}".encode()[:1000])
            os._exit(1)
        os.write(told, b"+")
        os.close(told)
        raise ProgramEnded(body())

    def _await(self, ready: int) -> None:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        answer = os.read(ready, 1000) if poll.poll(_READY_SECONDS * 1000) else b"not ready in time"
        os.close(ready)
        if answer != b"+":
            self.kill()
            raise SetUpFailed(answer.decode(errors="replace") or "ended before it was ready")

    def restart_clock(self) -> None:
        self.cpu_start, self.wall_start = cpu_seconds(self.pid), time.monotonic()

    def cpu(self) -> float:
        return (self.used if self.status is not None else cpu_seconds(self.pid)) - self.cpu_start

    def reap(self, options: int = os.WNOHANG) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, options)
            if pid:
                self.status, self.used = status, usage.ru_utime + usage.ru_stime
        return self.status is not None

    def await_ending(self) -> None:
        """Let a process that closed its channel end by itself, for a moment."""
        deadline = time.monotonic() + _ENDING_SECONDS
        while not self.reap() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.kill()

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        self.reap(0)

    def limit_cpu(self, seconds: float) -> None:
        """The kernel's own limit, a second above ours, should this process fail to act."""
        ceiling = math.ceil(cpu_seconds(self.pid) + seconds) + 1
        try:
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (ceiling, resource.RLIM_INFINITY))
        except (ProcessLookupError, PermissionError):
            return


def rearrange(keep: dict[int, int]) -> None:
    """Make descriptor ``n`` a copy of ``keep[n]`` and close all others."""
    above = max(keep) + 1
    lifted = {number: fcntl.fcntl(source, fcntl.F_DUPFD, above) for number, source in keep.items()}
    for number, source in lifted.items():
        os.dup2(source, number, inheritable=True)
    os.closerange(above, 1 << 16)


def close(descriptors: Iterable[int]) -> None:
    """Close descriptors; a forked child that unwinds through here has closed them already."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def process_descriptors(children: list[Child]) -> list[int]:
    """A descriptor for each process that gets readable when it ends; none on old kernels."""
    descriptors: list[int] = []
    with contextlib.suppress(OSError):
        descriptors += [os.pidfd_open(child.pid) for child in children]
    return descriptors


def fresh_interpreter(packages: list[str]) -> None:
    """Standard streams on whatever descriptors 0 to 2 are now, an empty environment, our paths."""
    os.environ.clear()
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread a core
    os.putenv("OMP_NUM_THREADS", "1")
    sys.argv[:] = ["program.py"]
    repository = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [*(entry for entry in sys.path if entry != repository), *packages]
    for name in ("exit", "quit"):  # what `site` would have put there
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    sys.stdin = sys.__stdin__ = _stream(0, "r")
    sys.stdout = sys.__stdout__ = _stream(1, "w")
    sys.stderr = sys.__stderr__ = _stream(2, "w")


def _stream(descriptor: int, mode: str) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, mode, closefd=False)
    buffered = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="replace")


def ending(status: int | None) -> str:
    """How a process ended: ``ok``, ``exit 1``, ``signal 9``."""
    if status is None:
        return "unknown"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    code = os.waitstatus_to_exitcode(status)
    return f"exit {code}" if code else "ok"
