"""What the ranks of the tests of conversion do: an import and an export whose small model fills
several files, as jobs of a running group and under torchrun.

    torchrun ... -m tests.distributed.conversion HF_DIR CHECKPOINT EXPORT [kill]
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from checkpoint_tools import export_hf, import_hf
from checkpoint_tools.arguments import start
from checkpoint_tools.streaming import weight_writer
from checkpoint_tools.streaming.team import Team, from_environment
from megatron_opdlm.checkpoint import save_weights
from megatron_opdlm.errors import RunError, command
from megatron_opdlm.model_files.manifest import BlockContract, read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from tests.distributed import jobs

CONTRACT = BlockContract(mask_token_id=64)
SHARD_BYTES = 90_000


def convert(hf: Path, checkpoint: Path, exported: Path, team: Team) -> None:
    """Import and export again, without the comparison at the end: the test compares."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weight_writer, "FILE_BYTES", 60_000)
        patched.setattr(export_hf, "compare", lambda *arguments, **options: [])
        with open_weights(hf) as weights:
            import_hf.convert(weights, checkpoint, CONTRACT, "fp32", team=team)
        export_hf.convert(
            checkpoint,
            exported,
            read_manifest(checkpoint),
            read_shape(hf),
            model_format="qwen3",
            dtype="fp32",
            shard_bytes=SHARD_BYTES,
            team=team,
        )


def save_on(layout: Layout, model_dir: Path, directory: Path) -> None:
    """Job: fill a model on a layout and save its weights."""
    save_weights(jobs.load(layout, model_dir), directory)


def fail_on_last_rank(hf: Path, checkpoint: Path) -> str:
    """Job: the disk of the last rank is full at its second tensor; the error that a rank raises."""
    team = from_environment("conversion")
    resolve, seen = weight_writer._Plan.resolve_data, []

    def resolve_data(self: weight_writer._Plan, item: object) -> object:
        seen.append(item)
        if team.rank == team.size - 1 and len(seen) == 2:
            raise OSError(28, "No space left on device")
        return resolve(self, item)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weight_writer._Plan, "resolve_data", resolve_data)
        patched.setattr(weight_writer, "FILE_BYTES", 60_000)
        with open_weights(hf) as weights:
            try:
                import_hf.convert(weights, checkpoint, CONTRACT, "fp32", team=team)
            except (OSError, RunError) as error:
                return f"{type(error).__name__}: {error}"
    return "nothing"


def _killed_at_its_second_tensor() -> None:
    resolve, seen = weight_writer._Plan.resolve_data, []

    def resolve_data(self: weight_writer._Plan, item: object) -> object:
        seen.append(item)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return resolve(self, item)  # type: ignore[arg-type]

    weight_writer._Plan.resolve_data = resolve_data  # type: ignore[method-assign, assignment]


def main() -> None:
    hf, checkpoint, exported = map(Path, sys.argv[1:4])
    team = start("conversion")
    if team.rank == team.size - 1 and sys.argv[4:] == ["kill"]:
        _killed_at_its_second_tensor()
    convert(hf, checkpoint, exported, team)


if __name__ == "__main__":
    command(main)
