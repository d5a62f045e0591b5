"""The largest amount of memory that a process has had: since it began, and since a moment."""

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

_PEAK_OF_RESIDENT = "5"  # proc(5), clear_refs


class PeakMemory:
    """``read`` gives the peak in bytes since ``reset`` was called last."""

    def __init__(self, read: Callable[[], int], reset: Callable[[], None]) -> None:
        self._read, self._reset, self._before = read, reset, 0

    def restart(self) -> None:
        """Count ``recent`` anew, from what is taken now."""
        self._before = self.highest()
        self._reset()

    def recent(self) -> int:
        """Bytes since ``restart``."""
        return self._read()

    def highest(self) -> int:
        """Bytes since the process began."""
        return max(self._before, self._read())


def resident() -> PeakMemory:
    """Of this process on its host. Where the system does not let it count anew, ``recent`` is
    ``highest``.
    """
    return PeakMemory(_peak_resident_bytes, _forget_peak_resident)


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def _forget_peak_resident() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_PEAK_OF_RESIDENT)
