"""A rank that trains and tells what memory it took."""

import ctypes
import json
from pathlib import Path

from megatron_opdlm.config import load_config

MMAP_THRESHOLD, TRIM_THRESHOLD, SMALL = -3, -1, 64 * 1024  # of glibc's mallopt; bytes


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def train_and_measure(arguments: list[str], start: Path) -> None:
    """Train; ``start`` gets the bytes that the process had before. What is freed goes back to the
    system at once, so that the largest resident memory is what was in use at a time."""
    from megatron_opdlm.train import run

    libc = ctypes.CDLL(None)
    assert libc.mallopt(MMAP_THRESHOLD, SMALL) and libc.mallopt(TRIM_THRESHOLD, SMALL)
    start.write_text(json.dumps(resident_bytes()))
    run(load_config(None, arguments))
