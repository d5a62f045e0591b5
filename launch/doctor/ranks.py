"""Whether ranks reach each other, how fast, and whether their machines are alike.

torchrun ... -m launch.doctor.ranks --out FILE.json
"""

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.doctor.finding import Finding
from launch.stages import ask, torchrun
from megatron_opdlm import launcher
from megatron_opdlm.errors import Arguments, command
from megatron_opdlm.model_files.writing import write_json

if TYPE_CHECKING:
    from megatron_opdlm.hardware import Hardware

TIMEOUT_SECONDS = 120  # for the ranks to find each other
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What ranks found out about each other."""

    backend: str  # "nccl" | "gloo"
    world: int  # ranks
    hosts: int
    right: bool  # a sum over all ranks is the sum
    latency_seconds: float  # of a sum of one number
    bytes_per_second: float  # of a large sum, through each rank
    differing: list[str]  # what is not the same on all ranks
    blind: list[int]  # ranks that do not see rank 0's file


def meet(hardware: "Hardware", place: Path) -> Meeting:
    """Join all ranks that the environment describes; ``place``: a directory that all should see.
    RuntimeError where they do not meet.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group(hardware.process_group_backend, timeout=timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([float(rank + 1)], device=hardware.device)
    dist.all_reduce(total)
    latency = _seconds(torch.zeros(1, device=hardware.device))
    numbers = (64 << 20 if hardware.device.type != "cpu" else 4 << 20) // 4
    large = _seconds(torch.zeros(numbers, device=hardware.device))
    token = [f".opdlm_doctor_{os.getpid()}_{time.time_ns()}"]
    dist.broadcast_object_list(token, device=hardware.device)
    file = place / token[0]
    if rank == 0:
        file.touch()
    dist.barrier()
    mine = {
        "host": socket.gethostname(),
        "Python": sys.version.split()[0],
        "PyTorch": torch.__version__,
        "device": (hardware.devices or ("cpu",))[0],
        "sees": file.exists(),
    }
    all_ranks: list[dict[str, Any]] = [{} for _ in range(world)]
    dist.all_gather_object(all_ranks, mine)
    if rank == 0:
        file.unlink(missing_ok=True)
    return Meeting(
        backend=hardware.process_group_backend,
        world=world,
        hosts=len({found["host"] for found in all_ranks}),
        right=float(total) == world * (world + 1) / 2,
        latency_seconds=latency,
        bytes_per_second=2 * (world - 1) / world * numbers * 4 / large,
        differing=[
            f"{key}: " + ", ".join(values)
            for key in ("Python", "PyTorch", "device")
            if len(values := sorted({found[key] for found in all_ranks})) > 1
        ],
        blind=[number for number, found in enumerate(all_ranks) if not found["sees"]],
    )


def _seconds(tensor: Any) -> float:
    """The fastest of a few sums over all ranks."""
    import torch.distributed as dist

    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def findings(meeting: Meeting, place: Path) -> Iterator[Finding]:
    """What a meeting says."""
    text = (
        f"{meeting.world} over {meeting.backend} on {meeting.hosts} machine(s): a sum takes "
        f"{meeting.latency_seconds * 1e6:,.0f} us, {meeting.bytes_per_second / 1e9:.2f} GB/s"
    )
    remedy = "" if meeting.right else "sums are wrong: replace the GPU or the network card"
    yield Finding(name="ranks", text=text, remedy=remedy, breaks=not meeting.right)
    for text in meeting.differing:
        yield Finding(name="ranks", text=f"not alike: {text}", remedy="use the same everywhere")
    if meeting.blind:
        text = f"ranks {meeting.blind} do not see files of {place}"
        remedy = "use a train.out on a file system that all machines share"
        yield Finding(name="ranks", text=text, remedy=remedy, breaks=True)


def start_and_meet(count: int, place: Path) -> Meeting:
    """The same with ``count`` ranks of this machine, started for it. RunError where they fail."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "meeting.json"
        flags = ("--out", str(out), "--place", str(place))
        ask(torchrun(count, "launch.doctor.ranks", *flags), 2 * TIMEOUT_SECONDS)
        return Meeting(**json.loads(out.read_text(encoding="utf-8")))


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--place", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    import torch.distributed

    from megatron_opdlm.hardware import select_hardware

    meeting = meet(select_hardware(), args.place)
    if launcher.rank() == 0:
        write_json(args.out, asdict(meeting))
    # Together: a rank that leaves while threads of another listen to it could end that one.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
