"""Runs generated programs where they can do no harm and cannot touch their own verdict.

Each program gets a *jail*: a process tree of its own behind namespaces, a user without rights, a
system-call filter, Landlock and resource limits, as far as the kernel grants them; which are in
force is probed once and reported by ``Sandbox.describe`` (docs/sandbox.md). A program receives
inputs and gives back output or values; expected values stay with the grader (or, for test code, in
a second process of the jail, which gets them after the program's process was made), and results
travel over descriptors that the program does not have.

Time limits are CPU seconds, which do not depend on how busy the machine is; wall time is bounded by
a generous multiple. The clock starts when the interpreter is ready.
"""

import itertools
import os
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from evaluation.jail import channel
from evaluation.jail.isolation import LAYERS, Limits
from megatron_opdlm.errors import RunError

__all__ = [
    "Jail",
    "JailLost",
    "Limits",
    "Outcome",
    "Sandbox",
    "default_sandbox",
    "package_directories",
    "sandbox_problem",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

_REPLY_LIMIT = 1 << 30
_SLACK_SECONDS = 300.0  # beyond a run's wall limit before a jail counts as lost
_USERS = range(61184, 65184)  # without names and files; as root each jail takes its own
# What is given up, in this order, where a jail with all layers does not run a first program.
_WEAKER: tuple[set[str], ...] = (
    set(),
    {"landlock"},
    {"mount_namespace"},
    {"landlock", "seccomp"},
    {"mount_namespace", "landlock", "seccomp"},
)
# Modules that nothing has loaded before: the jail must be able to read the interpreter's library.
_FIRST_PROGRAM = "import colorsys, decimal, heapq, statistics\nprint(6 * 7)"
_WALL_FACTOR, _WALL_EXTRA = 6.0, 20.0
# Without one of each the machine is open in that respect, and users are told.
_NEEDED = {
    "programs could use the network": {"network_namespace", "seccomp"},
    "programs could signal other processes of this user": {
        *("pid_namespace", "seccomp", "unprivileged_user")
    },
    "programs could write this user's files": {"mount_namespace", "landlock", "unprivileged_user"},
    "programs could read this user's files": {"mount_namespace", "landlock"},
    "the number of processes is not limited": {*("seccomp", "unprivileged_user", "user_namespace")},
    "the number of threads is not limited": {"unprivileged_user", "user_namespace"},
    "programs could fill the disk: each file is limited, their sum is not": {"mount_namespace"},
}


# Limits that hold with one of these layers only.
_LIMITS_NEED = {
    "work_space": {"mount_namespace"},
    "threads": {"unprivileged_user", "user_namespace"},
}


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
        ours, theirs = socket.socketpair()
        self.channel = ours
        script = Path(__file__).parent / "jail" / "process.py"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(script), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env={},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
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
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        if self.work:
            shutil.rmtree(self.work, ignore_errors=True)

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
        if self.process.poll() is None or self.process.stderr is None:
            return ""
        lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def package_directories() -> list[str]:
    """Where programs find packages: this environment's own, and the system's where it has them."""
    paths = sysconfig.get_paths()
    found = dict.fromkeys([paths["purelib"], paths["platlib"], *site.getsitepackages()])
    return [directory for directory in found if os.path.isdir(directory)]


class Sandbox:
    """Opens jails with what this machine's kernel grants, probed when it is made.

    RunError: programs cannot be run safely here at all; the line says why.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        layers: Iterable[str] = tuple(LAYERS),
        workers: int | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._users = itertools.cycle(_USERS)
        self._lock = threading.Lock()
        self.allowed, self.layers = self._probe(set(layers))

    def open(self) -> Jail:
        """A new jail. JailLost: it could not be set up (this once)."""
        return self._open(self.allowed)

    def _open(self, allowed: set[str]) -> Jail:
        with self._lock:
            uid = next(self._users) if os.geteuid() == 0 else os.geteuid()
        packages = package_directories()
        trees = list(dict.fromkeys([sys.base_prefix, sys.base_exec_prefix, *packages]))
        return Jail(
            {
                "limits": asdict(self.limits),
                "layers": sorted(allowed),
                "own_root": "mount_namespace" in allowed,
                "uid": uid,
                "packages": packages,
                "trees": trees,
            }
        )

    def _probe(self, wanted: set[str]) -> tuple[set[str], set[str]]:
        """Layers to ask for and layers in force, the most that run a first program."""
        reason = "no layer was tried"
        for without in _WEAKER:
            allowed = wanted - without
            try:
                with self._open(allowed) as jail:
                    if "layers" not in jail.greeting:
                        reason = str(jail.greeting)
                        continue
                    jail.load(_FIRST_PROGRAM)
                    outcome = jail.stdio("", cpu=60.0, wall=300.0)
            except JailLost as lost:
                reason = str(lost)
                continue
            if outcome.ok and outcome.stdout == "42\n":
                in_force = set(jail.greeting["layers"])
                return allowed - ({"mount_namespace"} - in_force), in_force
            reason = f"{outcome.status} {outcome.stderr.strip()[-200:]}"
        raise RunError(
            f"generated programs cannot be run safely on this machine ({reason}); run as an "
            "ordinary user, or with an interpreter that ordinary users may read"
        )

    def describe(self) -> dict[str, Any]:
        """What was in force, for a summary's settings. A limit that cannot be held here is None."""
        open_doors = [text for text, any_of in _NEEDED.items() if not any_of & self.layers]
        limits = asdict(self.limits)
        for name, any_of in _LIMITS_NEED.items():
            limits[name] = limits[name] if any_of & self.layers else None
        return {
            "layers": sorted(self.layers),
            "missing": sorted(set(LAYERS) - self.layers - self._spare()),
            "warnings": open_doors,
            "limits": limits,
            "workers": self.workers,
        }

    def _spare(self) -> set[str]:
        """Layers that are not needed because another one does their work."""
        return {"user_namespace"} if "unprivileged_user" in self.layers else {"unprivileged_user"}

    def run(self, job: Callable[[Jail], Result], lost: Result) -> Result:
        """Run a job in a jail of its own; a lost jail is tried again once, then ``lost``."""
        for _ in range(2):
            try:
                with self.open() as jail:
                    return job(jail)
            except JailLost:
                continue
        return lost

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``function`` of every item, in order, ``workers`` at a time."""
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            return list(pool.map(function, items))


_default: Sandbox | None = None
_default_lock = threading.Lock()
_warned = False


def default_sandbox() -> Sandbox:
    """The process' one sandbox with the default limits, probed on first use.

    RunError: as of ``Sandbox``. What is open on this machine is said once.
    """
    global _warned
    sandbox = _probed()
    with _default_lock:
        doors, _warned = [] if _warned else sandbox.describe()["warnings"], True
    for door in doors:
        print(f"warning: the sandbox is open here: {door} (docs/sandbox.md)", file=sys.stderr)
    return sandbox


def sandbox_problem() -> str | None:
    """Why programs cannot be run on this machine, with the remedy; None: they can."""
    try:
        _probed()
    except RunError as error:
        return str(error)
    return None


def _probed() -> Sandbox:
    global _default
    with _default_lock:
        if _default is None:
            _default = Sandbox()
        return _default
