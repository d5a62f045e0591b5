"""A rank saves and loads its share of the optimizer, and every layout finds each number of it."""

from pathlib import Path

import pytest

from tests.conftest import MASK, TinyModels
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.workers import WorkerGroups
from tests.tiny_models import make_qwen3

pytestmark = pytest.mark.distributed

LARGEST = 3 * 4 * 8192 * 256  # bytes of the largest tensor, three times: torch reads a file so


def keys(model: Path, *more: str) -> list[str]:
    return [f"model.path={model}", f"model.mask_token_id={MASK}", *more]


def test_memory_of_a_save_grows_with_the_share(ranks: WorkerGroups, tmp_path: Path):
    """Claim: of four replicas each takes memory for its quarter of the optimizer's state to save
    it, and little more to load it, not for the whole; each number is found where it belongs, on
    another number of ranks as well."""
    model = make_qwen3(
        tmp_path / "model", tied=False, seed=3, vocab=8192, hidden=256, ffn=1024, layers=2
    )
    command, one, four = keys(model), tmp_path / "one", tmp_path / "four"
    alone = jobs.save(command, one)
    saved = ranks(4).run(jobs.save, overrides=command, directory=four)
    assert sum(rank["own"] for rank in saved) == alone["own"] == alone["whole"]
    assert max(rank["own"] for rank in saved) < 0.26 * alone["whole"]
    assert max(rank["peak"] for rank in saved) < 1.3 * alone["whole"] / 4, saved
    read = ranks(4).run(jobs.read, overrides=command, directory=one)
    assert max(rank["peak"] for rank in read) < 2 * alone["whole"] / 4 + LARGEST, read
    jobs.read(command, four)


def test_megatron_reads_and_writes_the_same(
    ranks: WorkerGroups, models: TinyModels, tmp_path: Path
):
    """Claim: Megatron's own reader finds every number of what two replicas saved, and what
    Megatron's own writer saved, as earlier versions did, is read by two."""
    command = keys(models.hf("student", tied=False, layers=2))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ranks(2).run(jobs.save, overrides=command, directory=ours)
    jobs.read_by_megatron(command, ours)
    jobs.save_by_megatron(command, theirs)
    ranks(2).run(jobs.read, overrides=command, directory=theirs)
