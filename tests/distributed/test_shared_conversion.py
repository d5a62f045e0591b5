"""Claims: several ranks convert a model to the very files that one makes; what a killed rank leaves
has no final name. A rank that fails, and weights of any layout, are in test_conversion."""

import filecmp
from pathlib import Path

import pytest
import torch

from checkpoint_tools.streaming.team import Team, shares
from megatron_opdlm.model_files.safetensors_dir import open_weights
from tests.conftest import TinyModels
from tests.distributed import conversion
from tests.forking import ForkServer

PROGRAM = "tests.distributed.conversion"


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.distributed
def test_two_ranks_write_what_one_writes(
    fork_server: ForkServer, models: TinyModels, tmp_path: Path
) -> None:
    """Byte for byte, every file of the checkpoint and of the export; and that is the model."""
    hf = models.hf("student", tied=False)
    alone = tmp_path / "checkpoint1", tmp_path / "exported1"
    conversion.convert(hf, *alone, Team())
    for rank in fork_server.launch(
        2, PROGRAM, hf, tmp_path / "checkpoint2", tmp_path / "exported2"
    ):
        assert rank.returncode == 0, rank.stderr
    for one, two in zip(alone, (tmp_path / "checkpoint2", tmp_path / "exported2"), strict=True):
        assert files(one) == files(two)
        assert sum(n.endswith((".distcp", ".safetensors")) for n in files(one)) >= 5
        _, different, odd = filecmp.cmpfiles(one, two, files(one), shallow=False)
        assert (different, odd) == ([], [])
    with open_weights(hf) as expected, open_weights(tmp_path / "exported2") as found:
        for name in expected.names():
            assert torch.equal(found.get(name), expected.get(name)), name


@pytest.mark.distributed
def test_a_killed_rank_leaves_no_name(
    fork_server: ForkServer, models: TinyModels, tmp_path: Path
) -> None:
    hf = models.hf("student", tied=False)
    targets = tmp_path / "checkpoint", tmp_path / "exported"
    first, second = fork_server.launch(2, PROGRAM, hf, *targets, "kill")
    assert first.returncode != 0 and second.returncode == -9
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
