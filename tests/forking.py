"""A process that has imported everything once and forks others on request.

A start of Python with PyTorch, Megatron and transformers costs seconds of a core, a fork of what
has them costs milliseconds. The server itself never runs a model and has no thread but its own, so
forking is safe.
"""

import atexit
import ctypes
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 180  # imports on a busy machine
POLL_SECONDS = 0.005
GRACE_SECONDS = 5
# Of every fork, whatever the tests were started with.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True, kw_only=True)
class _Birth:
    """What a new process is to do; afterwards come ``handles`` file descriptors."""

    function: tuple[str, str]  # module and name
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    directory: Path
    output: Path
    errors: Path | None  # None: into ``output``
    handles: int


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A process that a server has forked, in a process group of its own."""

    server: "ForkServer"
    pid: int

    def poll(self) -> int | None:
        """Its exit code as ``subprocess`` has it; None while it lives."""
        return self.server.ask("wait", self.pid, 0.0)

    def wait(self, timeout: float) -> int:
        """Its exit code; TimeoutExpired where it lives longer than ``timeout`` seconds."""
        code = self.server.ask("wait", self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout)
        return code

    def signal(self, number: signal.Signals) -> None:
        """To the process and what it has started, if it lives."""
        if self.poll() is None:
            os.killpg(self.pid, number)


def _end_of_all(processes: Sequence[Fork], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    codes = [process.poll() for process in processes]
    failed = False
    while None in codes:
        if not failed and any(codes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                process.signal(signal.SIGKILL)
            if not failed:
                raise TimeoutError(f"no end after {timeout} seconds")
        time.sleep(POLL_SECONDS)
        codes = [process.poll() for process in processes]
    return [code for code in codes if code is not None]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ForkServer:
    """Started when first needed; ends with this process at the latest."""

    def __init__(self, imports: Sequence[str]) -> None:
        """``imports`` names the modules that every fork finds imported."""
        self._imports = list(imports)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def fork(
        self,
        function: Callable[..., object],
        *,
        output: Path,
        errors: Path | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path = REPOSITORY,
        handles: Sequence[int] = (),
        **arguments: Any,
    ) -> Fork:
        """A process that calls a module-level function with picklable arguments and ends as Python
        would: ``sys.exit`` included. ``handles`` are file descriptors that it gets, under numbers
        of its own, as the argument ``handles``.
        """
        if self._process is None:
            self._start()
        birth = _Birth(
            function=(function.__module__, function.__qualname__),
            arguments=arguments,
            environment=os.environ | ENVIRONMENT | dict(environment or {}),
            directory=directory,
            output=output,
            errors=errors,
            handles=len(handles),
        )
        assert self._process is not None
        self._connection.send(("fork", (birth,)))
        for handle in handles:
            send_handle(self._connection, handle, self._process.pid)
        return Fork(server=self, pid=self._connection.recv())

    def run(
        self, module: str, *arguments: object, timeout: float = 240, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """``python -m MODULE ARGUMENTS`` from the repository's root."""
        (done,) = self._programs(module, arguments, [environment], timeout)
        return done

    def launch(
        self, ranks: int, module: str, *arguments: object, timeout: float = 240
    ) -> list[subprocess.CompletedProcess[str]]:
        """The same on several ranks, as torchrun starts them; once one has failed, it ends the
        others after ``GRACE_SECONDS``.
        """
        port = free_port()
        environments = [rank_environment(rank, ranks, port) for rank in range(ranks)]
        return self._programs(module, arguments, environments, timeout)

    def _programs(
        self,
        module: str,
        arguments: Sequence[object],
        environments: Sequence[Mapping[str, str]],
        timeout: float,
    ) -> list[subprocess.CompletedProcess[str]]:
        command = [module, *map(str, arguments)]
        with tempfile.TemporaryDirectory(prefix="programs-") as folder:
            said = [
                (Path(folder, f"{number}.out"), Path(folder, f"{number}.err"))
                for number in range(len(environments))
            ]
            started = [
                self.fork(
                    run_program,
                    output=output,
                    errors=errors,
                    environment=environment,
                    module=module,
                    arguments=command[1:],
                )
                for (output, errors), environment in zip(said, environments, strict=True)
            ]
            codes = _end_of_all(started, timeout)
            return [
                subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))
                for code, files in zip(codes, said, strict=True)
            ]

    def ask(self, question: str, *arguments: Any) -> Any:
        self._connection.send((question, arguments))
        return self._connection.recv()

    def close(self) -> None:
        """End the server, and with it all its forks."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.forking", str(theirs.fileno())],
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection.send(self._imports)
        assert self._connection.poll(START_SECONDS), "the fork server did not start"
        self._connection.recv()


def serve(connection: Connection) -> None:
    """The server's life: import, then fork and wait on request until the other end closes."""
    for name in connection.recv():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported lives on: forks need neither scan it nor copy its pages
    connection.send(True)
    codes: dict[int, int] = {}
    while True:
        try:
            question, arguments = connection.recv()
        except EOFError:
            return
        if question == "fork":
            connection.send(_fork(connection, *arguments))
        else:
            connection.send(_wait(codes, *arguments))


def _fork(connection: Connection, birth: _Birth) -> int:
    handles = [recv_handle(connection) for _ in range(birth.handles)]
    ready, born = os.pipe()
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.setpgid(0, 0)
        die_with_parent()
        os.close(ready)
        os.close(born)
        _live(birth, handles)
    os.close(born)
    os.read(ready, 1)  # nothing comes: it ends once the fork can be stopped and ended as a group
    for handle in (ready, *handles):
        os.close(handle)
    return pid


def _wait(codes: dict[int, int], pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while pid not in codes:
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            return None
        else:
            time.sleep(POLL_SECONDS)
    return codes[pid]


def _live(birth: _Birth, handles: list[int]) -> NoReturn:
    """A fork's life."""
    try:
        for number, file in ((1, birth.output), (2, birth.errors)):
            if file is None:
                os.dup2(1, number)
            else:
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(birth.environment)
        os.chdir(birth.directory)
        module, name = birth.function
        function = getattr(importlib.import_module(module), name)
        function(**birth.arguments, **({"handles": handles} if handles else {}))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(module: str, arguments: Sequence[str]) -> None:
    """What ``python -m MODULE ARGUMENTS`` does once Python and the imports are there."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def die_with_parent() -> None:
    """A process that is stopped does not notice that nobody is left to wake it
    (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    from tests import forking  # what forks unpickle is not __main__'s

    forking.serve(Connection(int(sys.argv[1])))
