"""Runs commands as the stages of something larger, the pipeline or the quickstart: each is shown,
timed, ends with the process that started it, and is named where it fails.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_opdlm.errors import RunError, Stopped
from megatron_opdlm.reporting.progress import last_line

ROOT = Path(__file__).resolve().parents[1]
WATCH_SECONDS = 2.0  # between looks at how far a stage is
_CLEAR = "\033[K"  # the rest of a terminal's line
STOP_SECONDS = 30  # for a killed job to be gone
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one thread a rank: more are slower on a CPU
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # of libraries, in the way of progress bars
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step that is done once: what tells that its output is whole, and what makes it."""

    name: str
    complete: Callable[[], bool]
    command: Callable[[], list[str]]
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], object] = lambda: None
    launched: bool = False  # by a launcher, which hides its ranks' exit codes
    run: Path | None = None  # directory of a training, which saves before it stops


class Stages:
    """Runs commands from the repository's root and keeps the seconds of every stage."""

    def __init__(self, *, logs: Path | None = None, held: tuple[int, ...] = ()) -> None:
        """``logs``: a file a stage takes what its commands print; None: all goes to the terminal.
        ``held``: open files that stay locked until the command that runs has ended, too.
        """
        self.logs, self.held = logs, held
        self.seconds: dict[str, float] = {}
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def stage(self, name: str, headline: str) -> Iterator[None]:
        """Announce a stage and time it. A name may be used again: its seconds add up."""
        print(f"\n=== {headline}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def run(self, name: str, argv: list[str]) -> str:
        """Run a command to its end, output in ``logs/NAME.log``; returns its last line."""
        process = self.start(name, argv)
        if self._watch(name, process):
            raise self.failure(name, process.returncode)
        lines = self._logged(name).splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def start(self, name: str, argv: list[str], *, on_terminal: bool = False) -> subprocess.Popen:
        """Start a command; ``on_terminal``: its output is not for the log, but for people."""
        shown = [argument.replace(f"{ROOT}/", "") for argument in argv]
        print("$ " + shlex.join(shown), flush=True)
        log = None if on_terminal else self._log(name)
        with contextlib.ExitStack() as stack:
            return subprocess.Popen(
                argv,
                cwd=ROOT,
                env=_environment(),
                stdout=stack.enter_context(log.open("wb")) if log else None,
                stderr=subprocess.STDOUT if log else None,
                pass_fds=self.held,
                preexec_fn=_end_with_parent,
            )

    def _watch(self, name: str, process: subprocess.Popen) -> int:
        """Wait for a command; on a terminal, say how far it is, as its log does. Its code."""
        said = ""
        while sys.stderr.isatty() and self.logs is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=WATCH_SECONDS)
                break
            said = last_line(self._logged(name))[: shutil.get_terminal_size().columns - 1]
            print(f"\r{_CLEAR}{said}", end="", file=sys.stderr, flush=True)
        if said:
            print(f"\r{_CLEAR}", end="", file=sys.stderr, flush=True)
        return process.wait()

    def failure(self, name: str, code: int) -> RunError:
        """The error of a stage: its own ``error:`` line if it wrote one, and where to read more."""
        text = self._logged(name)
        where = f"; see {self._log(name)}" if text else ""
        return RunError(f"stage {name} ended with code {code}: {_reason(text)}{where}")

    def _log(self, name: str) -> Path | None:
        return None if self.logs is None else self.logs / f"{name}.log"

    def _logged(self, name: str) -> str:
        log = self._log(name)
        return log.read_text(encoding="utf-8", errors="replace") if log and log.is_file() else ""


def _environment() -> dict[str, str]:
    return {**_ENVIRONMENT, **os.environ}


def _reason(text: str) -> str:
    """What a command that failed said itself."""
    said = [line.removeprefix("error: ") for line in text.splitlines() if line[:7] == "error: "]
    return said[0] if said else "it gave no reason"


def ask(argv: list[str], seconds: float) -> str:
    """What a command prints that ends by itself within so many seconds, unseen. RunError where it
    fails, with its own reason, or takes longer.
    """
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_end_with_parent,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        stop(process)
        raise RunError(f"{shlex.join(argv)} did not end within {seconds:g} s") from error
    if process.returncode:
        raise RunError(f"code {process.returncode}: {_reason(text)}")
    return text


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent dies (Linux's prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Requests:
    """Whether the process was asked to stop; the stage under way is asked once, too."""

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen | None = None

    @classmethod
    def listen(cls) -> "Requests":
        """Take SIGTERM and SIGUSR1 from now on."""
        requests = cls()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, requests._take)
        return requests

    def _take(self, _signal: int, _frame: object) -> None:
        self.asked = True
        self._hand_on()

    def _hand_on(self) -> None:
        process, self._process = self._process, None  # once: a second would cut torchrun's wait off
        if process is not None:
            process.send_signal(signal.SIGTERM)

    @contextmanager
    def handed_on_to(self, process: subprocess.Popen) -> Iterator[subprocess.Popen]:
        """Requests reach ``process`` during the body, also one that came while it was started."""
        self._process = process
        if self.asked:
            self._hand_on()
        yield process
        self._process = None

    def stop_before(self, stage: str) -> None:
        """Raise Stopped where somebody has asked."""
        if self.asked:
            raise Stopped(f"asked to stop before stage {stage}; the same command goes on")


def stop(process: subprocess.Popen) -> None:
    """Stop a job as a power cut does: SIGKILL to the launcher and to every rank."""
    launcher = psutil.Process(process.pid)
    for victim in (launcher, *launcher.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"a stopped job did not end within {STOP_SECONDS} s") from error


def torchrun(ranks: int, module: str, *arguments: str) -> list[str]:
    """The command that starts ``module`` on ``ranks`` processes of this machine, any free port."""
    launcher = python("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return [*launcher, "-m", module, *arguments]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    return sorted(path.parent for path in run.glob("checkpoints/step_*/manifest.json"))
