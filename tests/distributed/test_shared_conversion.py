"""Claims: several ranks convert a model to the very files that one makes; what a killed rank leaves
has no final name. A rank that fails, and weights of any layout, are in test_conversion."""

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_tools.streaming.team import Team, shares
from megatron_opdlm.model_files.safetensors_dir import open_weights
from tests.conftest import TinyModels
from tests.distributed import conversion
from tests.distributed.workers import _free_port

SECONDS = 400


def under_torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks convert."""
    address = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *address]
    command = [*launcher, "-m", "tests.distributed.conversion", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.distributed
def test_two_ranks_write_what_one_writes(models: TinyModels, tmp_path: Path) -> None:
    """Byte for byte, every file of the checkpoint and of the export; and that is the model."""
    hf = models.hf("student", tied=False)
    alone = tmp_path / "checkpoint1", tmp_path / "exported1"
    conversion.convert(hf, *alone, Team())
    done = under_torchrun(hf, tmp_path / "checkpoint2", tmp_path / "exported2")
    assert done.returncode == 0, done.stderr
    for one, two in zip(alone, (tmp_path / "checkpoint2", tmp_path / "exported2"), strict=True):
        assert files(one) == files(two)
        assert sum(n.endswith((".distcp", ".safetensors")) for n in files(one)) >= 5
        _, different, odd = filecmp.cmpfiles(one, two, files(one), shallow=False)
        assert (different, odd) == ([], [])
    with open_weights(hf) as expected, open_weights(tmp_path / "exported2") as found:
        for name in expected.names():
            assert torch.equal(found.get(name), expected.get(name)), name


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_rank_leaves_no_name(models: TinyModels, tmp_path: Path) -> None:
    hf = models.hf("student", tied=False)
    done = under_torchrun(hf, tmp_path / "checkpoint", tmp_path / "exported", "kill")
    assert done.returncode != 0
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "exported").exists()


def test_shares_are_even_runs_of_neighbours() -> None:
    assert shares([1] * 6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert shares([10, 1, 1], 2) == [range(0, 1), range(1, 3)]
    assert shares([], 2) == [range(0, 0), range(0, 0)]
    assert shares([5], 3) == [range(0, 0), range(0, 1), range(1, 1)]
    for parts in (1, 2, 5, 64):
        found = shares(list(range(1, 40)), parts)
        assert [i for part in found for i in part] == list(range(39))
