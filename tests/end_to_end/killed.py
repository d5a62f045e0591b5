"""Training runs that are killed at a chosen moment. Runs as the only rank of a worker group
(tests/distributed/workers.py): imports everything once and forks a child for every run, which costs
nothing and can be killed for real. The parent itself never runs a model, so forking is safe.
"""

import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Everything that a run imports, before any fork.
import transformers.models.auto.tokenization_auto
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

import megatron_opdlm.run.interruption
import megatron_opdlm.run.opening
import megatron_opdlm.supervision.failures  # noqa: F401
from megatron_opdlm import train
from megatron_opdlm.errors import command

RUN_SECONDS = 240


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL for the whole process group: on the ``call``-th call of a function, from 1."""

    function: str  # "module:name" or "module:Class.name"
    call: int
    moment: str = "before"  # the call | "after" it | "half way" through writing a line


@dataclass(frozen=True, kw_only=True)
class KillWithin:
    """SIGKILL for the whole process group within a span of time after a function is called."""

    function: str
    call: int
    seconds: float
    seed: int


def run(
    overrides: list[str],
    kill: Kill | KillWithin | None = None,
    largest_file: int | None = None,
    log: Path | None = None,
) -> dict[str, Any]:
    """The command ``train`` in a child of its own process group; how it ended and what it said. The
    system refuses to write files of more than ``largest_file`` bytes; ``log`` is beside
    ``train.out`` if not given.
    """
    out = next(o for o in overrides if o.startswith("train.out=")).partition("=")[2]
    log = log or Path(out + ".log")
    gc.freeze()  # what is imported lives on: children need neither scan it nor copy its pages
    child = os.fork()
    if child == 0:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        _be_the_command(overrides, kill, log)
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the run did not end in {RUN_SECONDS} seconds: {log.read_text()}")
        time.sleep(0.01)
    return {"code": os.waitstatus_to_exitcode(status), "log": log.read_text()}


def _be_the_command(overrides: list[str], kill: Kill | KillWithin | None, log: Path) -> NoReturn:
    """The child\'s life; ends in ``command``, which exits, or in the kill."""
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # a single process without a launcher
            os.environ.pop(name, None)
        if kill is not None:
            _arm(kill)
        command(lambda: train.main(overrides))
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(99)


def _die() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)
    time.sleep(60)


def _arm(kill: Kill | KillWithin) -> None:
    """Wrap the function."""
    module_name, _, path = kill.function.partition(":")
    holder: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    original: Callable[..., Any] = getattr(holder, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != kill.call:
            return original(*args, **kwargs)
        if isinstance(kill, KillWithin):
            delay = random.Random(kill.seed).uniform(0, kill.seconds)
            threading.Timer(delay, _die).start()
            return original(*args, **kwargs)
        if kill.moment == "after":
            original(*args, **kwargs)
        if kill.moment == "half way":
            _write_half(*args)
        _die()

    setattr(holder, name, wrapped)


def _write_half(file: Path, records: list[dict[str, Any]]) -> None:
    """Stands in for ``append_jsonl``: the kill comes in the middle of a line."""
    text = json.dumps(records[0])
    with file.open("a") as stream:
        stream.write(text[: len(text) // 2])
