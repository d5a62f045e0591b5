"""Megatron checkpoint directories that are not what they should be: every reader refuses them in
one line and writes nothing. (Bits that flip and saves that are cut short: test_damage.py.)
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TinyModels
from tests.faults.refusals import Runner
from tests.tiny_models import edit_json


@pytest.fixture(scope="module")
def imported(models: TinyModels) -> Path:
    return models.imported("student", tied=True)


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(imported, tmp_path / "checkpoint"))


def unsealed(**changes: object) -> Callable[[Path], None]:
    """Change the manifest as somebody would by hand, and take its seal away."""
    return lambda d: edit_json(d / "manifest.json", seal=None, sha256=None, **changes)


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


def malicious(directory: Path) -> None:
    metadata = directory / "weights" / ".metadata"
    metadata.write_bytes(pickle.dumps(Payload(directory.parent / "owned")))
    files = json.loads((directory / "manifest.json").read_text())["files"]
    files["weights/.metadata"] = metadata.stat().st_size
    unsealed(files=files)(directory)


SPOILT: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), ("no manifest.json", "cut short")),
    "empty manifest": (
        lambda d: (d / "manifest.json").write_text(""),
        ("manifest.json is not valid JSON", "copy"),
    ),
    "manifest cut": (
        lambda d: (d / "manifest.json").open("r+b").truncate(300),
        ("manifest.json is not valid JSON", "copy"),
    ),
    "manifest as a list": (lambda d: (d / "manifest.json").write_text("[]"), ("holds a list",)),
    "manifest edited": (
        lambda d: edit_json(d / "manifest.json", dtype="bf16"),
        ("manifest.json is damaged", "use an earlier checkpoint"),
    ),
    "another format": (
        lambda d: edit_json(d / "manifest.json", format="megatron-opdlm/9"),
        ("format='megatron-opdlm/9'", "import the model again"),
    ),
    "no kind": (unsealed(kind=None), ("damaged", "kind")),
    "unknown kind": (unsealed(kind="wights"), ("kind='wights'", "earlier checkpoint")),
    "kind as a list": (unsealed(kind=["model"]), ("damaged", "earlier checkpoint")),
    "contract in words": (unsealed(block_contract="absolute"), ("damaged",)),
    "contract with another key": (unsealed(block_contract={"mask": 3}), ("damaged", "mask")),
    "files in a list": (unsealed(files=["weights"]), ("damaged", "earlier checkpoint")),
    "files in words": (unsealed(files=7), ("damaged", "earlier checkpoint")),
    "rank 0": (
        unsealed(low_rank={"rank": 0, "alpha": 1, "targets": ["x"]}),
        ("damaged", "low_rank"),
    ),
    "weights missing": (
        lambda d: next((d / "weights").glob("*.distcp")).unlink(),
        (r"weights/.*distcp is missing", "use an earlier checkpoint"),
    ),
    "no tokenizer": (
        lambda d: (d / "huggingface" / "tokenizer.json").unlink(),
        ("huggingface/tokenizer.json is missing", "copy it again"),
    ),
    "program in .metadata": (malicious, ("weights cannot be read", "posix.mkdir|os.mkdir|mkdir")),
}


@pytest.mark.parametrize("case", SPOILT)
def test_export(runner: Runner, checkpoint: Path, tmp_path: Path, case: str) -> None:
    spoil, patterns = SPOILT[case]
    spoil(checkpoint)
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--format", "a2d-qwen3"]
    runner.refuses(tmp_path, "export_hf", *arguments, patterns=patterns)
    if case != "program in .metadata":  # inspect reads no weights
        runner.refuses(tmp_path, "inspect", checkpoint, patterns=patterns)


def replaced(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Other bytes of the same number, so that sizes say nothing."""

    def change(directory: Path) -> None:
        content = (directory / name).read_bytes()
        assert len(old) == len(new) and old in content
        (directory / name).write_bytes(content.replace(old, new, 1))

    return change


DAMAGED: dict[str, Callable[[Path], None]] = {
    "huggingface/config.json": replaced("huggingface/config.json", b"50000.0", b"50001.0"),
    "huggingface/tokenizer.json": replaced("huggingface/tokenizer.json", b'"q"', b'"Q"'),
    "huggingface/generation_config.json": replaced(
        "huggingface/generation_config.json", b"48", b"47"
    ),
    "huggingface/chat_template.jinja": replaced(
        "huggingface/chat_template.jinja", b"assistant", b"assistent"
    ),
    "weights/.metadata": replaced("weights/.metadata", b"final_layernorm", b"final_layerform"),
    "weights/common.pt": replaced("weights/common.pt", b"PK", b"PQ"),
}


@pytest.mark.parametrize("file", DAMAGED)
def test_no_damaged_file_gets_into_an_export(
    runner: Runner, checkpoint: Path, models: TinyModels, tmp_path: Path, file: str
) -> None:
    """Claim: what an export is made of has the checksums of the manifest, small files too; and
    ``verify`` trusts no damaged configuration."""
    DAMAGED[file](checkpoint)
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--format", "qwen3"]
    patterns = (f"{file} is damaged", "use an earlier checkpoint")
    runner.refuses(tmp_path, "export_hf", *arguments, patterns=patterns)
    arguments = ["--hf", models.hf("student", tied=True), "--checkpoint", checkpoint]
    runner.refuses(tmp_path, "verify", *arguments, patterns=patterns)


def test_places_beside_a_checkpoint(runner: Runner, checkpoint: Path, tmp_path: Path) -> None:
    """Claim: the run directory, the Hugging Face part and a plain file are told apart."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for place, patterns in [
        (tmp_path / "run", ("is no Megatron checkpoint", "import_hf")),
        (checkpoint / "huggingface", ("is no Megatron checkpoint", "import_hf")),
        (checkpoint / "manifest.json", ("is not a directory", "give")),
        (tmp_path / "nowhere", ("is not a directory", "give")),
    ]:
        arguments = ["--checkpoint", place, "--out", tmp_path / "out", "--format", "qwen3"]
        runner.refuses(tmp_path, "export_hf", *arguments, patterns=patterns)


def test_verify(runner: Runner, checkpoint: Path, models: TinyModels, tmp_path: Path) -> None:
    """Claim: a checkpoint of another shape is bad input, one of other weights a failure."""
    flat, other = models.hf("student", tied=True, layers=2), models.hf("teacher", tied=True)
    for hf, code, pattern in [(flat, 2, "layers=2"), (other, 1, "differs in"), (checkpoint, 2, "")]:
        arguments = ["--hf", hf, "--checkpoint", checkpoint]
        runner.refuses(tmp_path, "verify", *arguments, patterns=(pattern,), code=code)
    arguments = ["--hf", other, "--checkpoint", other]
    runner.refuses(tmp_path, "verify", *arguments, patterns=("is no Megatron checkpoint",))


def test_export_flags(runner: Runner, checkpoint: Path, tmp_path: Path) -> None:
    given, out = ["--checkpoint", checkpoint], ["--out", tmp_path / "out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "note.json").write_text("{}")
    for arguments, patterns in [
        ([*given, *out, "--format", "gguf"], ("--format", "'gguf'", "sdar", "--help")),
        ([*given, *out], ("--format", "required", "--help")),
        ([*given, "--format", "sdar"], ("--out", "required")),
        ([*given, "--out", checkpoint, "--format", "sdar"], ("already holds files", "choose")),
        ([*given, "--out", tmp_path / "file", "--format", "sdar"], ("is a file", "choose")),
        ([*given, "--out", tmp_path / "file" / "x", "--format", "sdar"], ("file", "")),
        ([*given, *out, "--format", "sdar", "--dtype", "fp16"], ("--dtype", "'fp16'", "bf16")),
        ([*given, *out, "--format", "sdar", "--shard-bytes", "5GB"], ("--shard-bytes", "5GB")),
        ([*given, *out, "--format", "sdar", "--shard-bytes", "0"], ("--shard-bytes", "0")),
        (
            [*given, *out, "--format", "sdar", "--evaluation", tmp_path / "note.json"],
            ("note.json",),
        ),
        ([*given, *out, "--format", "sdar", "--evaluation", tmp_path / "no.json"], ("no.json",)),
        ([*given, *out, "--format", "sdar", "--fromat", "x"], ("--fromat", "--help")),
    ]:
        runner.refuses(tmp_path, "export_hf", *arguments, patterns=patterns)
