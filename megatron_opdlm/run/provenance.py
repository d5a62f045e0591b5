"""What a run was made with: code, packages, machine and command, for each of its starts."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from megatron_opdlm.model_files.writing import write_json
from megatron_opdlm.run.record_files import read_record

ENVIRONMENT = "environment.json"
CODE = Path(__file__).resolve().parents[2]  # what runs
REVISION_VARIABLE = "MEGATRON_OPDLM_REVISION"  # a container has the code without its repository
_PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "flash-attn",
    "nvidia-modelopt",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
)


def record_start(run_dir: Path, *, hardware: str, devices: Sequence[str], world_size: int) -> None:
    """Append this start to ``environment.json``, a list; the file is replaced as a whole.

    ``hardware``: why this hardware was chosen; ``devices``: names of this node's accelerators.
    """
    starts = read_starts(run_dir)
    starts.append(
        {
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "revision": revision(),
            "python": platform.python_version(),
            "packages": packages(),
            "world_size": world_size,
            "hardware": hardware,
            "devices": list(devices),
            "cpu_cores": psutil.cpu_count(logical=True),
            "memory_bytes": psutil.virtual_memory().total,
            "kernel": platform.release(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
    )
    write_json(run_dir / ENVIRONMENT, starts)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts so far. InputError where the file is damaged."""
    file = run_dir / ENVIRONMENT
    remedy = "remove it (it only lists the run's earlier starts) and start the same command again"
    return read_record(file, list, remedy) if file.is_file() else []


def packages() -> dict[str, str]:
    """Versions of what decides results and speed; packages that are not here are left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> dict[str, Any] | None:
    """The code's git commit and whether files differ from it; where it is no repository, a
    container's build argument; None where neither is known.

    A repository that is mounted over an image's code is not what the image was built of, so the
    variable never stands in for a repository whose git does not answer.
    """
    if not (CODE / ".git").exists():
        built_of = os.environ.get(REVISION_VARIABLE)
        return {"commit": built_of, "modified": None} if built_of else None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "modified": bool(changes)}


def _git(*arguments: str) -> str | None:
    """What git prints; None without git, a repository, or an answer in time."""
    # A mounted repository may belong to another user than the container's: git asks for leave. It
    # must not start a program that the repository names.
    leave = ["-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
    try:
        done = subprocess.run(
            ["git", *leave, "-C", str(CODE), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
