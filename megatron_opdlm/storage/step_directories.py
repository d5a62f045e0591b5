"""The names in ``checkpoints/`` of a run directory: which of them are the run's own, and which one
it goes on from. Only those are ever replaced or removed: what users keep beside them is theirs.

``step_NNNNNNN`` are checkpoints, ``.step_NNNNNNN.tmp`` and ``.old`` a save or a removal under way,
the files ``latest`` and ``best`` name one of the first.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import is_checkpoint
from megatron_opdlm.model_files.writing import half_written, write_text
from megatron_opdlm.storage.run_state import RunIdentity, is_of_run

LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step_\d{7,}")
_UNDER_WAY = re.compile(r"\.step_\d{7,}\.(tmp|old)")


def name_of(step: int) -> str:
    """A checkpoint's directory."""
    return f"step_{step:07d}"


def is_name(text: str) -> bool:
    """Whether a text can name a checkpoint."""
    return _NAME.fullmatch(text) is not None


def step_of(name: str) -> int:
    """The step of a checkpoint's name."""
    return int(name.removeprefix("step_"))


@dataclass(frozen=True, kw_only=True)
class StepDirectories:
    """``checkpoints/`` as rank 0 sees it."""

    directory: Path
    identity: RunIdentity | None = None  # None: every checkpoint is the run's own

    def of(self, step: int) -> Path:
        """Where a step's checkpoint is, or will be."""
        return self.directory / name_of(step)

    def under_way(self, step: int) -> Path:
        """Where a step's checkpoint is written."""
        return self.directory / f".{name_of(step)}.tmp"

    def has(self, step: int) -> bool:
        """Whether a step's checkpoint is published."""
        return is_checkpoint(self.of(step))

    def own(self) -> list[str]:
        """Names of the run's checkpoints, oldest first."""
        return [name for name in self._named(_NAME) if self._is_own(name)]

    def start(self) -> str | None:
        """The checkpoint to go on from, not checked yet: what ``latest`` names, without it the
        newest of the run; None: there is none. InputError where something else has the place of
        ``latest``, or stands where the run will write.
        """
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            raise InputError(f"{self.directory} is no directory; move it away")
        for pointer in (LATEST, BEST):
            path = self.directory / pointer
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise InputError(
                    f"{path} is no file: it has to hold the name of a checkpoint, such as "
                    f"{name_of(1)}; move away what is there"
                )
        name = self.pointed_to(LATEST)
        if name is None:
            name = next(reversed(self.own()), None)
        if name is None or is_name(name):
            self._require_room(step_of(name) if name else 0)
        return name

    def _require_room(self, step: int) -> None:
        """InputError where something of others has a name that the steps after ``step`` need."""
        later = [name for name in self._named(_NAME) if step_of(name) > step]
        taken = [name for name in later if not self._is_own(name)]
        taken += [name for name in self._named(_UNDER_WAY) if not self._is_directory(name)]
        if taken:
            raise InputError(
                f"{self.directory / taken[0]} is no checkpoint of this run, which will need that "
                "name; move it away"
            )

    def pointed_to(self, pointer: str) -> str | None:
        """The name in ``latest`` or ``best``; None where there is no such file."""
        file = self.directory / pointer
        if not file.is_file():
            return None
        return file.read_bytes().decode("utf-8", errors="backslashreplace").strip()

    def point(self, pointer: str, step: int) -> None:
        """Let ``latest`` or ``best`` name a step's checkpoint."""
        write_text(self.directory / pointer, name_of(step) + "\n")

    def discard_leftovers(self) -> None:
        """Remove what a save or a removal that was cut short has left."""
        if not self.directory.is_dir():
            return
        for name in self._named(_UNDER_WAY):
            shutil.rmtree(self.directory / name)
        for pointer in (LATEST, BEST):
            half_written(self.directory / pointer).unlink(missing_ok=True)

    def make_room(self, step: int) -> None:
        """A run that went back to an earlier checkpoint comes by again: its old one of this step
        goes. FileExistsError where something else has the name.
        """
        path = self.of(step)
        if os.path.lexists(path):
            if not self._is_own(path.name):
                raise FileExistsError(f"{path} is no checkpoint of this run; move it away")
            self.remove(path.name)

    def keep(self, number: int, newest: int, spared: str | None = None) -> None:
        """Remove the run's checkpoints but the ``number`` newest up to step ``newest``, the best
        and the one named ``spared``. Later ones are what a run left that went back; they are
        replaced as it comes by.
        """
        done = [name for name in self.own() if step_of(name) <= newest]
        spare = (self.pointed_to(BEST), spared)
        for name in done[:-number]:
            if name not in spare:
                self.remove(name)

    def remove(self, name: str) -> None:
        """Take away the name first: what is half removed must not look like a checkpoint."""
        condemned = self.directory / f".{name}.old"
        os.rename(self.directory / name, condemned)
        shutil.rmtree(condemned)

    def _named(self, pattern: re.Pattern[str]) -> list[str]:
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(filter(pattern.fullmatch, names), key=lambda name: (len(name), name))

    def _is_directory(self, name: str) -> bool:
        path = self.directory / name
        return path.is_dir() and not path.is_symlink()

    def _is_own(self, name: str) -> bool:
        return self._is_directory(name) and is_of_run(self.directory / name, self.identity)
