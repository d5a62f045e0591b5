"""What the launcher says of this process in its environment: torchrun, or srun by way of
``launch/slurm_rank.sh``. A process without one is alone.
"""

import os
import socket

_OF_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PLACE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LARGEST_PORT = 65535


def _number(name: str, alone: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else alone


def rank() -> int:
    """Number of this process; 0 where nothing sensible is said (``problem`` says that)."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of all processes; 1 where nothing sensible is said."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this machine."""
    return max(_number("LOCAL_WORLD_SIZE", 1), 1)


def is_one_of_several() -> bool:
    """Whether a launcher started this process, be it only one."""
    return "RANK" in os.environ


def forget() -> None:
    """This process is alone from here on, also for whoever asks its environment."""
    for name in _OF_LAUNCHER:
        os.environ.pop(name, None)


def environment_alone() -> dict[str, str]:
    """This process's environment for a program that is none of the ranks."""
    return {k: v for k, v in os.environ.items() if k not in (*_OF_LAUNCHER, *_PLACE)}


def problem() -> str | None:
    """Why these variables describe no process, and what to do; None: they do, or there are none."""
    found = {name: os.environ.get(name) for name in _OF_LAUNCHER}
    if found["RANK"] is None and found["WORLD_SIZE"] in (None, "1"):
        return None
    port = found["MASTER_PORT"] or ""
    makes_sense = (
        all(found.values())
        and all((found[name] or "").isdecimal() for name in ("RANK", "WORLD_SIZE"))
        and rank() < world_size()
        and port.isdecimal()
        and 0 < int(port) <= _LARGEST_PORT
        and os.environ.get("LOCAL_RANK", "0").isdecimal()
    )
    if makes_sense:
        return None
    found["LOCAL_RANK"] = os.environ.get("LOCAL_RANK")
    said = ", ".join(f"{name}{_described(value)}" for name, value in found.items())
    return f"{said} describe no process; start it with torchrun, or unset them"


def _described(value: str | None) -> str:
    return " is not set" if value is None else f"={value}" if value else " is empty"


def taken_port() -> str:
    """That another process has MASTER_PORT, and one that is free."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    return (
        f"MASTER_PORT={os.environ['MASTER_PORT']}, at which rank 0 awaits the others, is taken on "
        f"this machine; use a free one, such as MASTER_PORT={free} (torchrun: --master-port)"
    )


def no_meeting(reason: str) -> str:
    """That the ranks did not find each other; ``reason`` is torch's."""
    return (
        f"rank {rank()} of {world_size()} did not meet the others at "
        f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']} "
        f"({reason.splitlines()[0]}); start all ranks with the same two, on machines that reach "
        "that address"
    )
