"""Training runs on several ranks that are disturbed at a chosen moment on a chosen rank.

Runs on every rank of a worker group (tests/distributed/workers.py): imports everything once and
forks a child for every run, which is a rank of a job of its own, with its own process group, and
can be killed or stopped for real.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Everything that a run imports, before any fork.
import transformers.models.auto.tokenization_auto
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

import megatron_opdlm.replay
import megatron_opdlm.run.interruption
import megatron_opdlm.run.opening
import megatron_opdlm.supervision.failures  # noqa: F401
from megatron_opdlm import parallel, train
from megatron_opdlm.errors import command
from megatron_opdlm.supervision import watchdog
from megatron_opdlm.supervision.blame import calls_made

SECONDS = 240  # for a whole run on a busy machine
PIECE_BYTES = 32 << 10  # what cannot be had any more once memory has run out
REFUSALS = 200  # in a row: malloc asks one more of its arenas at each
_ballast: list[bytearray] = []


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Something that happens to a rank before the ``call``-th call of a function, from 1."""

    function: str  # "module:name" or "module:Class.name"
    call: int
    action: str  # a key of _ACTIONS
    rank: int | None = 0  # None: every rank


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank's process ended."""

    code: int | None  # negative: by that signal; None: it was stopped and still is
    log: str
    log_file: Path
    process: int
    when: float  # seconds on the monotonic clock, which all processes share

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith(("error:", "stopped:"))]


def run(
    arguments: list[str],
    logs: Path,
    port: int = 0,
    disturbance: Disturbance | None = None,
    module: str = "megatron_opdlm.train",
    pause_seconds: float = 0.0,
) -> Ended:
    """A command in a child of this rank; ``port`` 0: it is the only rank of its job. A rank that is
    stopped goes on after ``pause_seconds``, if that is not 0.
    """
    rank = int(os.environ["RANK"])
    log = logs / f"rank{rank}.log"
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, log, port, disturbance, rank, module)
    deadline = time.monotonic() + SECONDS
    while True:
        finished, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if finished and pause_seconds and os.WIFSTOPPED(status):
            time.sleep(pause_seconds)
            os.killpg(child, signal.SIGCONT)
        elif finished:
            break
        if time.monotonic() > deadline:
            end(child)
            raise TimeoutError(f"the run did not end in {SECONDS} seconds: {log.read_text()}")
        time.sleep(0.01)
    code = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    text, now = log.read_text(), time.monotonic()
    return Ended(code=code, log=text, log_file=log, process=child, when=now)


def end(process: int) -> None:
    """SIGKILL for a rank, and for the children that it may have."""
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)


def wake(process: int, only_rank: int) -> int | None:
    """SIGCONT for a rank's stopped child; its exit code."""
    if int(os.environ["RANK"]) != only_rank:
        return None
    os.killpg(process, signal.SIGCONT)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _be_the_command(
    arguments: list[str],
    log: Path,
    port: int,
    disturbance: Disturbance | None,
    rank: int,
    module: str,
) -> NoReturn:
    """The child's life; ends in ``command``, which exits, or in the disturbance."""
    try:
        os.setpgid(0, 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if port:
            os.environ["MASTER_PORT"] = str(port)
        else:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
        if disturbance is not None and disturbance.rank in (rank, None):
            arm(disturbance)
        command(lambda: importlib.import_module(module).main(arguments))
    except SystemExit as exit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(exit.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(99)


def arm(disturbance: Disturbance) -> None:
    """Wrap the function."""
    module, _, path = disturbance.function.partition(":")
    holder: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    original: Callable[..., Any] = getattr(holder, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == disturbance.call:
            _ACTIONS[disturbance.action](*args)
        return original(*args, **kwargs)

    setattr(holder, name, wrapped)


def _signal(number: signal.Signals) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), number)


def _loop(*_: Any) -> None:
    """Alive, and nowhere: what a deadlock or an endless loop of one's own looks like."""
    while True:
        time.sleep(0.01)


def _loop_unseen(*_: Any) -> None:
    """Rank 1 loops, and that the other waits for it cannot be seen in its Python: as on GPUs."""
    assert watchdog._current is not None
    watchdog._WAITING, watchdog._current.calls = (), calls_made
    if parallel.rank() == 1:
        _loop()


def _fail(*_: Any) -> None:
    raise ValueError("a mistake that nobody foresaw")


def _exhaust_memory(*_: Any) -> None:
    """From here on there is no piece of memory as large as a tensor, only small ones."""
    gc.collect()  # now, not later
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() // 2  # so what is given back cannot be had again
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    refusals = 0
    while refusals < REFUSALS:
        try:
            _ballast.append(bytearray(PIECE_BYTES))
            refusals = 0
        except MemoryError:
            refusals += 1


def _poison(student: Any, *_: Any) -> None:
    """A weight of the student that is not a number, after it has generated."""
    student.model.decoder.final_layernorm.weight.data[3] = float("nan")


_ACTIONS: dict[str, Callable[..., None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "terminate": _signal(signal.SIGTERM),
    "warn": _signal(signal.SIGUSR1),
    "loop": _loop,
    "loop unseen": _loop_unseen,
    "fail": _fail,
    "exhaust memory": _exhaust_memory,
    "poison": _poison,
}


def main() -> None:
    """``torchrun -m tests.faults.disturbed ARGUMENTS``: training that is disturbed, as FAULT says,
    in the first life of its ranks only.
    """
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        arm(Disturbance(**json.loads(os.environ["FAULT"])))
    train.main()


if __name__ == "__main__":
    command(main)
