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
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from importlib.machinery import PathFinder
from typing import Any, TypeVar

from evaluation.jail.doors import DANGERS, LIMITS_NEED, NUISANCES, is_closed, open_doors
from evaluation.jail.isolation import LAYERS, Limits
from evaluation.jail.jail import Jail, JailLost, Outcome
from evaluation.jail.packages import package_directories, readable_trees
from evaluation.jail.values import decode, encode
from megatron_opdlm.errors import RunError

__all__ = [
    "Jail",
    "JailLost",
    "Limits",
    "Outcome",
    "Sandbox",
    "default_sandbox",
    "sandbox_problem",
    "unseen_modules",
    "use_sandbox",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

_USERS = range(61184, 65184)  # without names and files; as root each jail takes its own
# What is given up, in this order, where a jail with all layers does not run a first program: rights
# are dropped in other ways first, then one thing is confined the less.
_OTHER_USER: tuple[set[str], ...] = (
    set(),
    {"unprivileged_user"},
    {"unprivileged_user", "user_namespace"},
)
_WEAKER: tuple[set[str], ...] = (
    set(),
    {"landlock"},
    {"seccomp"},
    {"mount_namespace"},
    {"landlock", "seccomp"},
    {"mount_namespace", "landlock", "seccomp"},
)
# Modules that nothing has loaded before: the jail must be able to read the interpreter's library,
# and its packages where it has any of those that programs use most.
_FIRST_PROGRAM = "import colorsys, decimal, heapq, statistics\nprint(6 * 7)"
_FIRST_PACKAGES = ("numpy",)
_UNSEEN = "import importlib.util\ndef unseen(names):\n" + (
    "    return [name for name in names if importlib.util.find_spec(name) is None]"
)
BEST_EFFORT = "best-effort"


class Sandbox:
    """Opens jails with what this machine's kernel grants, probed when it is made.

    RunError: programs cannot be run here, or not safely and nobody asked for that by
    ``best_effort``; the line says why.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        layers: Iterable[str] = tuple(LAYERS),
        workers: int | None = None,
        best_effort: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._users = itertools.cycle(_USERS)
        self._lock = threading.Lock()
        self.allowed, self.layers = self._probe(set(layers))
        dangers = open_doors(DANGERS, self.layers)
        if dangers and not best_effort:
            raise RunError(
                f"generated programs could {', '.join(dangers)} on this machine: its kernel grants "
                f"the sandbox no more than {sorted(self.layers) or 'nothing'}; run where it grants "
                "seccomp filters or user namespaces (docs/sandbox.md), or, if they may do that, "
                f"with --sandbox {BEST_EFFORT} (training: evaluation.sandbox={BEST_EFFORT})"
            )

    def open(self) -> Jail:
        """A new jail. JailLost: it could not be set up (this once)."""
        return self._open(self.allowed)

    def _open(self, allowed: set[str]) -> Jail:
        with self._lock:
            another_user = os.geteuid() == 0 and "unprivileged_user" in allowed
            uid = next(self._users) if another_user else os.geteuid()
        packages = package_directories()
        return Jail(
            {
                "limits": asdict(self.limits),
                "layers": sorted(allowed),
                "own_root": "mount_namespace" in allowed,
                "uid": uid,
                "packages": packages,
                "trees": readable_trees(packages),
            }
        )

    def _probe(self, wanted: set[str]) -> tuple[set[str], set[str]]:
        """Layers to ask for and layers in force, the most that run a first program: without an open
        door if there are such.
        """
        reasons: dict[str, None] = {}  # ordered
        found, tried = None, []
        for without, rights in itertools.product(_WEAKER, _OTHER_USER):
            allowed = wanted - without - rights
            if allowed in tried or (found and allowed <= found[0]):
                continue
            tried.append(allowed)
            try:
                in_force = self._try(allowed)
            except JailLost as lost:
                reasons[str(lost)] = None
                continue
            found = found or (allowed, in_force)
            if not open_doors(DANGERS, in_force):
                return allowed, in_force
        if found is not None:
            return found
        raise RunError(
            f"generated programs cannot be run on this machine ({'; '.join(reasons)}); run as an "
            "ordinary user, or with an interpreter that ordinary users may read"
        )

    def _try(self, allowed: set[str]) -> set[str]:
        """Layers in force when these are asked for. JailLost: a first program does not run."""
        packages = [n for n in _FIRST_PACKAGES if PathFinder.find_spec(n, package_directories())]
        with self._open(allowed) as jail:
            if "layers" not in jail.greeting:
                raise JailLost(str(jail.greeting))
            jail.load("".join(f"import {name}\n" for name in packages) + _FIRST_PROGRAM)
            outcome = jail.stdio("", cpu=60.0, wall=300.0)
        if not outcome.ok or outcome.stdout != "42\n":
            raise JailLost(f"{outcome.status} {outcome.stderr.strip()[-200:]}")
        return set(jail.greeting["layers"])

    @cache  # noqa: B019 - one sandbox a process
    def unseen(self, modules: tuple[str, ...]) -> list[str]:
        """Those modules that a program cannot find, whatever this process finds."""

        def ask(jail: Jail) -> list[str]:
            jail.load(_UNSEEN)
            jail.start(cpu=60.0)
            outcome = jail.call("unseen", encode([list(modules)]), cpu=60.0)
            return decode(outcome.value) if outcome.ok else list(modules)

        return self.run(ask, list(modules))

    def describe(self) -> dict[str, Any]:
        """What was in force, for a summary's settings. A limit that cannot be held here is None."""
        limits = asdict(self.limits)
        for name, held_by in LIMITS_NEED.items():
            limits[name] = limits[name] if is_closed(held_by, self.layers) else None
        doors = open_doors(DANGERS | NUISANCES, self.layers)
        return {
            "layers": sorted(self.layers),
            "missing": sorted(set(LAYERS) - self.layers - self._spare()),
            "warnings": [f"programs could {door}" for door in doors],
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


_default: Sandbox | RunError | None = None  # RunError: why there is none
_default_lock = threading.Lock()
_best_effort = False
_warned = False


def use_sandbox(asked: str) -> None:
    """``required`` or ``best-effort`` of a flag or key, for the whole process."""
    global _best_effort, _default
    if _best_effort != (asked == BEST_EFFORT):
        _best_effort, _default = asked == BEST_EFFORT, None


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
    """Why programs are not run on this machine, with the remedy; None: they are."""
    try:
        _probed()
    except RunError as error:
        return str(error)
    return None


def unseen_modules(modules: tuple[str, ...]) -> list[str]:
    """Those that programs of the default sandbox cannot find; none where there is no sandbox."""
    return _probed().unseen(modules) if sandbox_problem() is None else []


def _probed() -> Sandbox:
    global _default
    with _default_lock:
        if _default is None:
            try:
                _default = Sandbox(best_effort=_best_effort)
            except RunError as error:
                _default = error
        if isinstance(_default, RunError):
            raise _default
        return _default
