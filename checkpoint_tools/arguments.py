"""What the commands share: the types they offer, and how they start."""

import os
import warnings

from megatron_opdlm.errors import InputError

DTYPES = ("bf16", "fp32")


def start_alone(command: str) -> None:
    """Refuse torchrun, where every rank would write the same directory, and silence libraries.

    Megatron and its saving processes warn about every optional kernel that is not installed.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise InputError(
            f"{command} was started with {world_size} ranks; start it once, without torchrun"
        )
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.filterwarnings("ignore")
