"""What this rank is doing: the step, the phase, and when it last got on with it.

The stages call ``advance`` after each forward or microbatch, so that a long phase is told from a
hung one. The watchdog reads it from its own thread; errors name it.
"""

import time
from dataclasses import dataclass, field, replace

SET_UP = "set-up"


@dataclass
class Activity:
    """One rank's place in a run."""

    step: int = 0  # 0: before the first
    phase: str = SET_UP
    advanced: float = field(default_factory=time.monotonic)  # seconds on the monotonic clock

    def __str__(self) -> str:
        return f"phase {self.phase}" + (f" of step {self.step}" if self.step else "")

    @property
    def idle_seconds(self) -> float:
        """Since the last sign of progress."""
        return time.monotonic() - self.advanced


_now = Activity()


def enter(phase: str, step: int = 0) -> None:
    """Begin a phase."""
    global _now
    _now = Activity(step=step, phase=phase)


def advance(seconds: float = 0.0) -> None:
    """A piece of work is done. ``seconds`` dates it into the future, for a process that slept."""
    _now.advanced = time.monotonic() + seconds


def current() -> Activity:
    """A copy of what goes on at this moment."""
    return replace(_now)
