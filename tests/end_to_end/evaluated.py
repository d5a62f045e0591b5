"""Evaluations that are killed at a chosen moment, and evaluations on the ranks of a worker group.

    python -m tests.end_to_end.evaluated LINES [flags of evaluation.run]

is ``evaluation.run`` whose first rank dies by SIGKILL when it has written LINES predictions and
half of the next.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from evaluation import run
from evaluation.decoding_flags import Loading
from evaluation.generation.predictions import Predictions
from evaluation.sample import open_generator
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import command


def evaluate(
    model: Path, loading: Loading, tasks: list[str], data: Path, decoding: Decoding, samples: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """On every rank of a group, or in a process of its own: summary rows and predictions."""
    loaded = run.load_tasks(tasks, data, None)
    return run.evaluate(open_generator(model, loading), loaded, decoding, samples, {})


def _die_after(lines: int) -> None:
    """The next line is torn."""
    append, written = Predictions._append, 0

    def count(self: Predictions, line: bytes) -> None:
        nonlocal written
        if written == lines:
            append(self, line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, line)
        written += 1

    Predictions._append = count


if __name__ == "__main__":
    _die_after(int(sys.argv.pop(1)))
    command(run.main)
