"""A program for launchers to start: its ranks meet over gloo and say who they were.

    python -m tests.end_to_end.launched OUT [--code N] [--until-signal]

OUT gets rank_N.json of every rank with the sum of all ranks' numbers + 1: they have met.
--code: the exit status. --until-signal: leave with it only when SIGUSR1 or SIGTERM has come.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--until-signal", action="store_true")
    args = parser.parse_args()
    waited = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    seen = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", GRACE)
    found = {"sum": int(total)} | {name: os.environ.get(name) for name in seen}
    partial = args.out / f".rank_{rank}"
    partial.write_text(json.dumps(found))
    partial.replace(args.out / f"rank_{rank}.json")
    print(f"rank {rank} speaks", flush=True)
    if args.until_signal:
        signal.sigwait(waited)
    dist.destroy_process_group()
    sys.exit(args.code)


if __name__ == "__main__":
    main()
