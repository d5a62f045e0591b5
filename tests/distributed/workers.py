"""Long-lived ranks for tests: one process a rank that run one function after another.

``megatron_opdlm.parallel.init`` can be called again with another layout, so a group of two ranks
serves TP2, PP2 and DP2 in turn. A rank that dies, an exception on any rank and a job that takes too
long all end the job with ``RanksFailed``, and the group with it: after a failure nobody knows which
collective the others are in.
"""

import gc
import importlib
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.forking import Fork, ForkServer, free_port, rank_environment

GRACE_SECONDS = 2  # for the others' reports once one rank has failed
LOG_TAIL = 3000  # characters of a rank's output shown after a failure


class RanksFailed(AssertionError):
    """A job did not end well on every rank; the message holds every rank's story."""


class WorkerGroup:
    """``ranks`` processes with torchrun's environment, on this machine, without accelerators."""

    def __init__(self, ranks: int, server: ForkServer) -> None:
        self.ranks = ranks
        self._logs = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._processes: list[Fork] = []
        self._connections: list[Connection] = []
        port = free_port()
        for rank in range(ranks):
            ours, theirs = Pipe()
            process = server.fork(
                serve,
                output=self._log(rank),
                environment=rank_environment(rank, ranks, port),
                handles=[theirs.fileno()],
            )
            self._processes.append(process)
            self._connections.append(ours)
            theirs.close()  # so that a rank's death is the end of its connection
        self._signal(signal.SIGSTOP)

    @property
    def alive(self) -> bool:
        """Whether the group can take another job."""
        return bool(self._processes) and all(p.poll() is None for p in self._processes)

    @property
    def process_ids(self) -> list[int]:
        """Of the ranks, in their order."""
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *, timeout: float = 60, **arguments: Any) -> list:
        """Call a module-level function with picklable arguments on every rank; results by rank.

        Between two jobs the ranks are stopped: the threads of their gloo groups would wake 100
        times a second, which with the groups of many tests takes a third of a core.
        """
        assert self.alive, "the group was closed after a failure; ask for a new one"
        job = (function.__module__, function.__qualname__, arguments)
        self._signal(signal.SIGCONT)
        for connection in self._connections:
            connection.send(job)
        results = self._collect(function.__qualname__, timeout)
        self._signal(signal.SIGSTOP)
        return results

    def run_each(
        self,
        function: Callable[..., Any],
        cases: Sequence[Mapping[str, Any]],
        *,
        timeout: float = 60,
        **arguments: Any,
    ) -> list[list]:
        """Call the function once for each case as one job; results by case, then by rank."""
        names = function.__module__, function.__qualname__
        each = self.run(_each, timeout=timeout, of=names, cases=list(cases), same=arguments)
        return [list(results) for results in zip(*each, strict=True)]

    def close(self) -> None:
        """End every rank now, whatever it is doing."""
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait(GRACE_SECONDS)
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _signal(self, number: signal.Signals) -> None:
        """To every rank and what it has started."""
        for process in self._processes:
            process.signal(number)

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank{rank}.log"

    def _collect(self, job: str, timeout: float) -> list:
        """Every rank's reply to the job; RanksFailed, and the group closed, where one is bad."""
        deadline = time.monotonic() + timeout
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        results: dict[int, Any] = {}
        stories: dict[int, str] = {}
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    succeeded, reply = connection.recv()
                except (EOFError, OSError):
                    succeeded, reply = False, self._obituary(rank)
                if succeeded:
                    results[rank] = reply
                else:
                    stories[rank] = reply
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not stories and not pending:
            return [results[rank] for rank in range(self.ranks)]
        waited = "" if stories else f" in {timeout} seconds"
        stories |= dict.fromkeys(pending.values(), "gave no answer" + waited)
        failure = self._describe(job, stories)
        self.close()
        raise RanksFailed(failure)

    def _obituary(self, rank: int) -> str:
        try:
            code = self._processes[rank].wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"died with exit code {code}"

    def _describe(self, job: str, stories: dict[int, str]) -> str:
        lines = [f"{job} failed on {len(stories)} of {self.ranks} ranks"]
        for rank, story in sorted(stories.items()):
            output = self._log(rank).read_text(errors="replace")[-LOG_TAIL:]
            lines += [f"--- rank {rank}: {story}", f"--- rank {rank}, its output:", output]
        return "\n".join(lines)


class WorkerGroups:
    """Groups by size, started when first asked for, and anew after a failure."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._groups: dict[int, WorkerGroup] = {}

    def __call__(self, ranks: int) -> WorkerGroup:
        group = self._groups.get(ranks)
        if group is None or not group.alive:
            if group is not None:
                group.close()
            group = self._groups[ranks] = WorkerGroup(ranks, self._server)
        return group

    def close(self) -> None:
        """End all groups."""
        for group in self._groups.values():
            group.close()
        self._groups = {}


def _each(
    of: tuple[str, str], cases: list[Mapping[str, Any]], same: Mapping[str, Any]
) -> list[Any]:
    module, name = of
    call = getattr(importlib.import_module(module), name)
    return [call(**same, **case) for case in cases]


def serve(handles: list[int]) -> None:
    """A rank's life: answer jobs until the other end closes."""
    connection = Connection(handles[0])
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            os._exit(0)  # without the process group's farewell, which waits for the others
        try:
            function = getattr(importlib.import_module(module), name)
            reply = (True, function(**arguments))
        except BaseException:
            reply = (False, "raised\n" + traceback.format_exc())
        connection.send(reply)
        # Models and optimizers are cycles that hold gloo groups, and their threads, until then.
        # What is left are modules that the job has imported: no later collection need look there.
        del reply, arguments
        gc.collect()
        gc.freeze()
