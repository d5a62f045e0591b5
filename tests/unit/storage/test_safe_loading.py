"""No code from data: what is read from a checkpoint or a model directory is never executed."""

import ast
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opdlm.storage import safe_metadata

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.metadata import Metadata

from checkpoint_tools.streaming.megatron_weights import read_weights
from megatron_opdlm import parallel
from megatron_opdlm.checkpoint import load_weights
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import BlockContract, read_manifest, write_manifest
from megatron_opdlm.model_files.names import hf_from_megatron
from megatron_opdlm.model_files.shape import read_shape
from tests.conftest import TinyModels
from tests.distributed import jobs

REPOSITORY = Path(__file__).parents[3]
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


def test_loading_warns_of_nothing(checkpoint: Path):
    """Claim: what a library says of its own names does not reach the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        jobs.load(parallel.Layout(), checkpoint)


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


def test_a_flipped_bit_of_the_index_is_an_error_of_ours(checkpoint: Path):
    """Claim: weights are read, or refused in one line, whatever bit of the index has flipped where
    no checksum tells (a manifest from before there were any)."""
    shape, index = read_shape(checkpoint / "huggingface"), checkpoint / "weights" / ".metadata"
    good, generator = index.read_bytes(), torch.Generator().manual_seed(2)
    refused = 0
    for bit in torch.randint(8 * len(good), (200,), generator=generator).tolist():
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        index.write_bytes(bytes(content))
        try:
            for _ in hf_from_megatron(shape, read_weights(checkpoint, shape)):
                pass
        except InputError as error:
            assert "\n" not in str(error) and ("; use " in str(error) or ": import " in str(error))
            refused += 1
    assert refused > 150


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


def trusting(tree: ast.AST) -> list[ast.AST]:
    """Every place where ``trust_remote_code`` gets a value other than ``False``: as an argument, a
    key, a name or an attribute; and any other use of its name, which might hand it on.
    """
    flag, found = "trust_remote_code", []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == flag:
            found += [node] if ast.unparse(node.value) != "False" else []
        elif (
            (isinstance(node, ast.Constant) and node.value == flag)
            or (isinstance(node, ast.Name) and node.id == flag)
            or (isinstance(node, ast.Attribute) and node.attr == flag)
            or (isinstance(node, ast.arg) and node.arg == flag)
        ):
            found.append(node)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=trusted)",
        "options = {'trust_remote_code': True}; load(x, **options)",
        "load(x, **dict(trust_remote_code=True))",
        "options['trust_remote_code'] = True",
        "trust_remote_code = True",
        "options.trust_remote_code = True",
        "def load(trust_remote_code): ...",
    ],
)
def test_trust_is_seen_in_every_spelling(source: str):
    assert trusting(ast.parse(source))
    assert not trusting(ast.parse("load(x, trust_remote_code=False)"))


# Where an export is loaded as its users do, if ``foreign_code`` finds nothing.
TRUSTING = {"checkpoint_tools/engines/load.py": 3}


def test_only_our_own_code_is_trusted():
    """Claim: remote code is switched on in one function alone, whose first act is to leave where
    there is code of others."""
    found = {
        file.relative_to(REPOSITORY).as_posix(): trusting(ast.parse(file.read_text()))
        for file in SOURCES
    }
    assert {file: len(nodes) for file, nodes in found.items() if nodes} == TRUSTING
    (file,) = TRUSTING
    (function,) = [
        node
        for node in ast.parse((REPOSITORY / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(trusting(function)) == TRUSTING[file]
    first = "\n".join(ast.unparse(node) for node in function.body[1:3])
    assert first.startswith("foreign = foreign_code(directory)\nif foreign:\n    return ")


def test_the_sources_load_data_only():
    """Claim: no source calls ``pickle`` (but the allow-listed unpickler), or ``torch.load`` without
    ``weights_only=True``."""
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
            if name == "torch.load":
                assert ast.unparse(options["weights_only"]) == "True", file
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), (file, name)
            assert name not in ("numpy.load", "np.load") or "allow_pickle" not in options, file
