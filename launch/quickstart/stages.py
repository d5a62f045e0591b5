"""Run the quickstart's stages as separate commands: shown, logged, timed, named when they fail."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_opdlm.errors import RunError

STOP_SECONDS = 30  # for a killed job to be gone


class Stages:
    """Runs commands from the repository's root and keeps the seconds of every stage."""

    def __init__(self, root: Path, logs: Path) -> None:
        self.root, self.logs = root, logs
        self.seconds: dict[str, float] = {}
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
        if process.wait():
            raise self.failure(name, process.returncode)
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def start(self, name: str, argv: list[str], *, on_terminal: bool = False) -> subprocess.Popen:
        """Start a command; output goes to the log, or to the terminal for progress bars."""
        print("$ " + " ".join(_shown(argument, self.root) for argument in argv), flush=True)
        environment = {
            "OMP_NUM_THREADS": "1",  # one thread a rank: more are slower at this size
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore::FutureWarning",  # of libraries, in the way of progress bars
            **os.environ,
        }
        if on_terminal:
            return subprocess.Popen(argv, cwd=self.root, env=environment)
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                argv, cwd=self.root, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def failure(self, name: str, code: int) -> RunError:
        """The error of a stage: its own ``error:`` line if it wrote one, and where to read more."""
        log = self._log(name)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        said = [line.removeprefix("error: ") for line in text.splitlines() if line[:7] == "error: "]
        where = f"; see {log}" if log.is_file() else ""
        return RunError(
            f"stage {name} ended with code {code}: {(said or ['it gave no reason'])[0]}{where}"
        )

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(ranks), "-m", module, *arguments]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _shown(argument: str, root: Path) -> str:
    """An argument as a user would type it in the repository's root."""
    return argument.replace(f"{root}/", "")
