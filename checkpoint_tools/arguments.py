"""What the commands share: the types they offer, and how they start."""

import argparse
import gc
import os
import warnings

from checkpoint_tools.streaming.team import Team, from_environment
from megatron_opdlm.errors import InputError

DTYPES = ("bf16", "fp32")


def start(command: str) -> Team:
    """Silence libraries; the processes that work together, as torchrun describes them.

    Megatron and its saving processes warn about every optional kernel that is not installed.
    Imports make hundreds of thousands of objects that stay: a sixth of the time that they take
    is the search for garbage among them.
    """
    gc.set_threshold(50_000)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.filterwarnings("ignore")
    return from_environment(command)


def start_alone(command: str) -> None:
    """The same for a command that cannot share its work: refuse torchrun."""
    team = start(command)
    if team.size != 1:
        raise InputError(
            f"{command} was started with {team.size} ranks; start it once, without torchrun"
        )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """The flag of the commands that have a progress bar."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
