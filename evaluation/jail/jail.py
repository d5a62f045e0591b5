"""A jail as the grader sees it: what it asks of the trusted process inside, and what comes back."""

import contextlib
import itertools
import os
import secrets
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluation.jail import channel, prepared

_REPLY_LIMIT = 1 << 30
_ENDING_SECONDS = 10.0
_SLACK_SECONDS = 300.0  # beyond a run's wall limit before a jail counts as lost
_WALL_FACTOR, _WALL_EXTRA = 6.0, 20.0


class JailLost(Exception):
    """The jail's trusted process is gone or could not confine a program; nothing was decided."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run or a call came to.

    ``status``: ``ok``; ``cpu_time``, ``wall_time``, ``output_limit`` (a limit was passed);
    ``exception`` (raised by a call); ``exit N``, ``signal N`` (how the program ended); ``ended``
    (before it answered); ``broken_channel`` (it wrote what is no answer).
    """

    status: str
    cpu_seconds: float
    stdout: str = ""
    stderr: str = ""  # the end of it
    value: str = ""  # as evaluation.jail.values.decode reads it
    detail: str = ""
    own: float = 0.0  # of ``calls``: CPU seconds by the program's own account
    failure: str | None = None  # of test code: the first failed test
    passed: int = 0  # of test code: tests passed

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def wall_limit(cpu: float) -> float:
    """Wall seconds granted for ``cpu`` seconds: a busy machine gives a program a share only."""
    return _WALL_FACTOR * cpu + _WALL_EXTRA


class Jail:
    """One jail: load a program, then run it, call it or test it. Use as a context manager."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.work = "" if settings["own_root"] else tempfile.mkdtemp(prefix="program-")
        self.channel, theirs = socket.socketpair()
        self.errors, errors = os.pipe()  # closed by the jail's end
        os.set_blocking(self.errors, False)
        try:
            self.group = prepared.fork_jail(theirs.fileno(), errors)
        except OSError as error:
            self.channel.close()
            os.close(self.errors)
            self._remove_work()
            raise JailLost(f"not made: {error}") from error
        finally:
            theirs.close()
            os.close(errors)
        try:
            self.greeting = self._exchange({**settings, "work": self.work}, _SLACK_SECONDS)
        except JailLost:
            self.close()
            raise

    def __enter__(self) -> "Jail":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything in the jail and remove its directory."""
        self.channel.close()  # the trusted process ends, and with it its namespace
        if not self._has_ended(_ENDING_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            self._has_ended(_ENDING_SECONDS)
        os.close(self.errors)
        self._remove_work()

    def _has_ended(self, seconds: float) -> bool:
        """Whether all trusted processes have let go of their error output within this time."""
        poll = select.poll()
        poll.register(self.errors, 0)  # hang-ups are reported unasked
        return bool(poll.poll(seconds * 1000))

    def _remove_work(self) -> None:
        if self.work:
            remove_tree(self.work)

    def load(self, source: str) -> None:
        """The program of the following runs; what ran before is ended."""
        self._exchange({"do": "load", "source": source}, _SLACK_SECONDS)

    def stdio(
        self, stdin: str, *, cpu: float, wall: float | None = None, prompts: bool = True
    ) -> Outcome:
        """Run the program as ``__main__`` on ``stdin``, in a process of its own.

        ``ok``: it ran to its end or left by SystemExit. ``cpu``, ``wall``: seconds. ``prompts``:
        whether what a program asks by ``input(prompt)`` is part of its output, as in Python.
        """
        return self._run({"do": "stdio", "stdin": stdin, "prompts": prompts}, cpu, wall)

    def start(self, *, cpu: float, wall: float | None = None) -> Outcome:
        """Run the program's definitions, to be called afterwards; ``value`` lists its names."""
        return self._run({"do": "start"}, cpu, wall)

    def call(
        self,
        name: str,
        arguments: str,
        *,
        cpu: float,
        wall: float | None = None,
        within: str | None = None,
    ) -> Outcome:
        """Call a function of the started program, or a method of class ``within`` if it has one.

        ``arguments``: a list, as ``evaluation.jail.values.encode`` writes it.
        """
        request = {"do": "call", "name": name, "args": arguments}
        return self._run({**request, "within": within} if within else request, cpu, wall)

    def calls(
        self,
        name: str,
        arguments: list[str],
        *,
        cpu: list[float],
        total: float,
        within: str | None = None,
    ) -> Iterator[Outcome]:
        """``call`` with each of many argument lists, up to the first that is not ``ok``. ``cpu``:
        seconds of each; ``total``: of all together.
        """
        walls = [wall_limit(seconds) for seconds in cpu]
        request = {"do": "calls", "name": name, "args": arguments, "cpus": cpu, "walls": walls}
        request |= {"total": total} | ({"within": within} if within else {})
        left = len(arguments)
        while left > 0:
            replies = self._exchange(request, sum(walls) + _SLACK_SECONDS)["replies"]
            for reply in replies:
                seconds = reply.pop("cpu", 0.0)
                yield Outcome(cpu_seconds=seconds, **reply)
                if reply["status"] != "ok":
                    return
            left -= len(replies)
            request = {"do": "more"}

    def judge(
        self,
        *,
        setup: list[str],
        functions: list[str],
        snippets: list[str],
        collect: bool = False,
        cpu: float,
        wall: float | None = None,
    ) -> Outcome:
        """Run test code against the program (``evaluation.jail.judge.run``), once in a jail's life.

        ``ok`` and ``failure is None``: every test passed. ``cpu`` holds for all tests together. The
        program's process is made before the tests are sent, and none is made afterwards: a forked
        process holds whatever the jail's trusted one has held. JailLost: this jail has judged.
        """
        self._exchange({"do": "stand_by"}, _SLACK_SECONDS)
        tests = {"setup": setup, "functions": functions, "snippets": snippets, "collect": collect}
        return self._run({"do": "judge", "tests": tests}, cpu, wall)

    def _run(self, request: dict[str, Any], cpu: float, wall: float | None) -> Outcome:
        wall = wall_limit(cpu) if wall is None else wall
        reply = self._exchange({**request, "cpu": cpu, "wall": wall}, wall + _SLACK_SECONDS)
        seconds = reply.pop("cpu", 0.0)
        reply.pop("total", None)
        return Outcome(cpu_seconds=seconds, **reply)

    def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        descriptor = self.channel.fileno()
        try:
            channel.send(descriptor, message)
            deadline = time.monotonic() + seconds
            reply = channel.receive(descriptor, limit=_REPLY_LIMIT, deadline=deadline)
        except channel.ChannelClosed as error:
            raise JailLost(f"{error}{self._last_words()}") from error
        if reply.get("status") == "sandbox_failed":
            raise JailLost(reply["detail"])
        return reply

    def _last_words(self) -> str:
        try:
            lines = os.read(self.errors, 1 << 16).decode(errors="replace").strip().splitlines()
        except BlockingIOError:  # alive and silent
            return ""
        return f": {lines[-1]}" if lines else ""


def remove_tree(top: str) -> None:
    """Remove what a program left behind, however deep, whatever its modes, as far as we may.

    Directories are lifted to the top before they are looked into: paths stay short and nothing
    recurses, where ``shutil.rmtree`` ends in a RecursionError.
    """
    names = map(f"{secrets.token_hex(8)}-{{}}".format, itertools.count())
    left = [top]
    while left:
        place = left.pop()
        with contextlib.suppress(OSError):
            os.chmod(place, 0o700)
            for entry in list(os.scandir(place)):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)  # moving a directory changes its ".."
                    left.append(os.path.join(top, next(names)))
                    os.rename(entry.path, left[-1])
                else:
                    os.unlink(entry.path)
            if place != top:
                os.rmdir(place)
    with contextlib.suppress(OSError):
        os.rmdir(top)
