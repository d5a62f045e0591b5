"""No code from data: what is read from a checkpoint or a model directory is never executed."""

import ast
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.files import safe_metadata

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.metadata import Metadata

from checkpoint_tools.manifest import BlockContract, read_manifest, write_manifest
from megatron_opdlm import parallel
from megatron_opdlm.checkpoint import load_weights
from megatron_opdlm.errors import InputError
from tests.conftest import TinyModels
from tests.distributed import jobs

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("megatron_opdlm", "checkpoint_tools", "evaluation", "launch", "benchmarks")


class Attack:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.fixture
def checkpoint(models: TinyModels, tmp_path: Path) -> Path:
    """An imported model that may be tampered with."""
    import shutil

    parallel.init(parallel.Layout())
    return shutil.copytree(models.imported("student", tied=True), tmp_path / "model")


def replace_index(checkpoint: Path, content: bytes) -> None:
    """Another index, and a manifest that agrees: the attacker writes both."""
    (checkpoint / "weights" / safe_metadata.INDEX).write_bytes(content)
    old = read_manifest_of(checkpoint)
    write_manifest(checkpoint, kind="model", dtype=old.dtype, block_contract=old.block_contract)


def read_manifest_of(checkpoint: Path) -> Any:
    import json

    content = json.loads((checkpoint / "manifest.json").read_text())
    contract = BlockContract(**content["block_contract"])
    return type("Old", (), {"dtype": content["dtype"], "block_contract": contract})


def attacks(proof: Path) -> dict[str, Any]:
    index = Metadata(state_dict_metadata={})
    index.planner_data = Attack(os.mkdir, str(proof))
    return {
        "a call in place of the index": Attack(os.system, f"mkdir {proof}"),
        "a call inside the index": index,
        "evaluated text": Attack(eval, f"__import__('os').mkdir({str(proof)!r})"),
        "an attribute of a class": Attack(getattr, Metadata, "__init__"),
        "a tensor's own loader": Attack(torch.load, str(proof)),
    }


@pytest.mark.parametrize("name", attacks(Path("unused")))
def test_a_malicious_index_is_refused(checkpoint: Path, tmp_path: Path, name: str):
    """Claim: an index that would run code is refused by every way to load a checkpoint, and the
    code does not run; plain pickle does run it."""
    proof = tmp_path / "proof"
    content = pickle.dumps(attacks(proof)[name])
    replace_index(checkpoint, content)
    read_manifest(checkpoint)  # the manifest is in order
    weights = checkpoint / "weights"
    with pytest.raises(safe_metadata.UnsafeContent, match="is refused"):
        safe_metadata.read_metadata(weights)
    with pytest.raises(CheckpointingException):
        dist_checkpointing.load_tensors_metadata(str(weights))
    with pytest.raises(InputError, match="is refused"):
        jobs.load(parallel.Layout(), checkpoint)
    assert not proof.exists()
    if name in ("a call in place of the index", "a call inside the index", "evaluated text"):
        pickle.loads(content)
        assert proof.exists(), "the attack is none"


def test_a_malicious_archive_is_refused(checkpoint: Path, tmp_path: Path):
    """Claim: ``common.pt`` and the tensors' files are loaded as data even where torch's default is
    switched off by its environment variable."""
    proof, archive = tmp_path / "proof", io.BytesIO()
    torch.save({"content_metadata": Attack(os.mkdir, str(proof))}, archive)
    (checkpoint / "weights" / "common.pt").write_bytes(archive.getvalue())
    with pytest.raises(CheckpointingException, match=r"common\.pt is refused"):
        safe_metadata.read_common(checkpoint / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        with pytest.raises((CheckpointingException, InputError, RuntimeError)):
            load_weights(jobs.load(parallel.Layout(), checkpoint), checkpoint / "weights")
    assert not proof.exists()


def test_an_index_cannot_read_elsewhere(checkpoint: Path):
    """Claim: tensors come from the checkpoint's own directory."""
    index = safe_metadata.read_metadata(checkpoint / "weights")
    next(iter(index.storage_data.values())).relative_path = "../../secret"
    replace_index(checkpoint, pickle.dumps(index))
    with pytest.raises(safe_metadata.UnsafeContent, match="reads from"):
        safe_metadata.read_metadata(checkpoint / "weights")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_of_an_index_reads_back(checkpoint: Path, protocol: int):
    """Claim: the allow-list is long enough, whatever protocol and Python wrote the index."""
    weights = checkpoint / "weights"
    index = safe_metadata.read_metadata(weights)
    (weights / safe_metadata.INDEX).write_bytes(pickle.dumps(index, protocol))
    again = safe_metadata.read_metadata(weights)
    assert again.state_dict_metadata == index.state_dict_metadata
    assert again.storage_data == index.storage_data


def test_random_bytes_are_no_index(checkpoint: Path):
    """Claim: a damaged index is an error of ours, never one of pickle's many."""
    generator = torch.Generator().manual_seed(1)
    good = (checkpoint / "weights" / safe_metadata.INDEX).read_bytes()
    for _ in range(200):
        content = bytearray(good)
        for place in torch.randint(len(good), (3,), generator=generator).tolist():
            content[place] = (content[place] + 1 + place) % 256
        (checkpoint / "weights" / safe_metadata.INDEX).write_bytes(bytes(content))
        try:
            safe_metadata.read_metadata(checkpoint / "weights")
        except CheckpointingException:
            continue


SOURCES = [file for package in PACKAGES for file in sorted((REPOSITORY / package).rglob("*.py"))]


def calls(tree: ast.AST) -> list[tuple[str, dict[str, ast.expr]]]:
    return [
        (ast.unparse(node.func), {word.arg: word.value for word in node.keywords if word.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def test_the_sources_load_data_only():
    """Claim: no source calls ``pickle`` (but the allow-listed unpickler), ``torch.load`` without
    ``weights_only=True``, or anything with ``trust_remote_code=True``."""
    assert len(SOURCES) > 50
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (
                node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")]
            )
        }
        assert not imported & {"dill", "joblib", "cloudpickle", "shelve", "marshal"}, file
        for name, options in calls(tree):
            flag = options.get("trust_remote_code")
            assert flag is None or ast.unparse(flag) == "False", (file, name)
            if name == "torch.load":
                assert ast.unparse(options["weights_only"]) == "True", file
            if file.name != "mailbox.py":  # between the ranks of one job, never from a file
                assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), (file, name)
            assert name not in ("numpy.load", "np.load") or "allow_pickle" not in options, file
