"""A Hugging Face directory for each checkpoint that a run keeps (``checkpoint.export``):
``exports/FORMAT/step_NNNNNNN`` of the run directory.

One process at a time, ``opdlm export`` on the host's processors, writes them while the run goes on:
it publishes a directory whole or not at all, and dies with the run. Nothing of the run reads them.
What is to be done is read from the directories, so a start makes up what an earlier one did not get
to: a checkpoint that is kept has its exports, the newest one's come first, and they go with it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_opdlm import launcher
from megatron_opdlm.checkpoint import Checkpoints
from megatron_opdlm.hardware import gpu
from megatron_opdlm.storage.step_directories import is_name, step_of

EXPORTS = "exports"
_ROOT = Path(__file__).parents[2]  # where the packages lie
_LEFTOVER = re.compile(r"step_\d{7,}\.tmp-\d+|\.step_\d{7,}\.old")
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class _Running:
    """An export that is being made."""

    format: str
    step: str  # name of the checkpoint
    process: subprocess.Popen[bytes]
    output: IO[bytes]


@dataclass(kw_only=True)
class Exports:
    """``exports/`` of a run directory. Rank 0 alone calls its methods."""

    directory: Path
    formats: list[str]  # none: nothing is exported
    checkpoints: Checkpoints
    say: Callable[[str], None]  # a line for people
    _running: _Running | None = None
    _failed: set[tuple[str, str]] = field(default_factory=set)  # (format, step)
    _ended: bool = False

    def begin(self) -> None:
        """Remove what kills have left, and exports of steps that the run will do again."""
        last = self.checkpoints.latest_step()
        for format in self.formats:
            for name in self._names(format):
                if _LEFTOVER.fullmatch(name):
                    shutil.rmtree(self.directory / format / name)
                elif is_name(name) and step_of(name) > last:
                    self._remove(format, name)

    def advance(self) -> None:
        """Take up where things stand, without waiting: called after every step."""
        if self._ended or not self.formats:
            return
        running = self._running
        if running is not None:
            if running.process.poll() is None:
                return
            self._running = self.checkpoints.in_use = None
            if running.process.returncode:
                self._say_failed(running)
            running.output.close()
        self._remove_orphans()
        wanted = self._wanted()
        if wanted:
            self._start(*wanted[0])

    def finish(self, alive: Callable[[], None], stop: Callable[[], bool]) -> None:
        """Make what is missing and wait for it, saying ``alive`` meanwhile; until told to stop."""
        if self._ended or not self.formats:
            return
        self.advance()
        if self._running is not None:
            self.say(f"the end of the run waits for the exports in {self.directory}")
        while self._running is not None and not stop():
            alive()
            time.sleep(_POLL_SECONDS)
            self.advance()
        if self._running is not None:
            self.say("asked to stop before all exports were made; the same command makes them")
        self.abandon()
        self.checkpoints.keep_to_number()
        if self._failed:
            missing = ", ".join(sorted("/".join(pair) for pair in self._failed))
            self.say(f"not exported: {missing}; the checkpoints are whole, opdlm export makes them")

    def abandon(self) -> None:
        """End the export under way, and start none again: the next start makes it."""
        running, self._running, self._ended = self._running, None, True
        self.checkpoints.in_use = None
        if running is None:
            return
        running.process.kill()
        running.process.wait()
        running.output.close()
        for name in self._names(running.format):
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(self.directory / running.format / name)

    def _wanted(self) -> list[tuple[str, str]]:
        """(format, step) of every export that is missing, those of the newest checkpoint first."""
        last = self.checkpoints.latest_step()
        kept = [name for name in self.checkpoints.places.own() if step_of(name) <= last]
        pairs = [(format, name) for name in reversed(kept) for format in self.formats]
        return [
            (format, name)
            for format, name in pairs
            if (format, name) not in self._failed and name not in self._names(format)
        ]

    def _start(self, format: str, step: str) -> None:
        checkpoint, out = self.checkpoints.directory / step, self.directory / format / step
        program = ["checkpoint_tools.export_hf", "--checkpoint", str(checkpoint)]
        program += ["--out", str(out), "--format", format, "--quiet"]
        follower = ["-m", "megatron_opdlm.supervision.follower", str(os.getpid())]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        output = tempfile.TemporaryFile()  # noqa: SIM115 -- closed when the process has ended
        self.checkpoints.in_use = step  # it must not be removed meanwhile
        self._running = _Running(
            format=format,
            step=step,
            process=subprocess.Popen(
                [sys.executable, *follower, *program],
                env={**launcher.environment_alone(), **gpu.HIDDEN, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ),
            output=output,
        )

    def _say_failed(self, running: _Running) -> None:
        """The first failure of a format is told when it comes, the others at the end."""
        first = all(format != running.format for format, _ in self._failed)
        self._failed.add((running.format, running.step))
        if not first:
            return
        running.output.seek(0)
        lines = running.output.read().decode(errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = said[-1] if said else f"it ended with code {running.process.returncode}"
        self.say(
            f"{running.step} was not exported as {running.format} ({reason}); training goes on, "
            "and its checkpoints are whole"
        )

    def _remove_orphans(self) -> None:
        """Exports whose checkpoint is no longer kept."""
        own = self.checkpoints.places.own()
        for format in self.formats:
            for name in self._names(format):
                if is_name(name) and name not in own:
                    self._remove(format, name)

    def _remove(self, format: str, name: str) -> None:
        """Its name goes first: what is half removed must not look like an export."""
        condemned = self.directory / format / f".{name}.old"
        os.rename(self.directory / format / name, condemned)
        shutil.rmtree(condemned)

    def _names(self, format: str) -> list[str]:
        place = self.directory / format
        return sorted(os.listdir(place)) if place.is_dir() else []
