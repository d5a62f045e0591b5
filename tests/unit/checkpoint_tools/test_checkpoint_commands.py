"""Claims: a command refuses bad input in one line with exit code 2 and writes nothing; a failure
leaves nothing behind, neither under the final nor under a temporary name; a save that was cut
short is recognised."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_tools import export_hf, import_hf, inspect, serve_check
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.checksums import sha256_of
from megatron_opdlm.model_files.families import QWEN3_MOE
from megatron_opdlm.model_files.formats import check_format
from megatron_opdlm.model_files.manifest import (
    BlockContract,
    Manifest,
    read_manifest,
    write_manifest,
)
from megatron_opdlm.model_files.shape import Experts, read_shape
from megatron_opdlm.model_files.writing import check_free, new_directory
from megatron_opdlm.run import run_lock
from tests.tiny_models import edit_json, make_qwen3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_qwen3(tmp_path / "model", tied=False, seed=1, layers=1)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"), new_directory(tmp_path / "out") as temporary:
        (temporary / "part").write_text("half")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Claim: where the file system takes no more, the line names the output and the remedy."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = r"out not written: .*No space left.*make room"
    with pytest.raises(RunError, match=message), new_directory(tmp_path / "out"):
        raise full
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_a_mount_point_refused(tmp_path: Path) -> None:
    """Claim: a link to an empty directory gets the result in its place; a place that cannot be
    renamed to is refused before any work."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_directory(tmp_path / "link") as temporary:
        (temporary / "part").write_text("whole")
    assert (tmp_path / "there" / "part").read_text() == "whole"
    with pytest.raises(InputError, match="/proc is a mount point; name a directory inside it"):
        check_free(Path("/proc"))


def test_one_job_at_a_time(tmp_path: Path) -> None:
    """Claim: a second job waits for the first to end, and names it where it does not."""
    first = os.open(tmp_path / run_lock.LOCK, os.O_RDWR | os.O_CREAT)
    os.write(first, b"process 12 on here\n")
    fcntl.flock(first, fcntl.LOCK_EX)
    problem = run_lock._take(tmp_path, 0.3)
    assert problem is not None and "another job works there (process 12 on here)" in problem
    threading.Timer(0.3, os.close, [first]).start()
    assert run_lock._take(tmp_path, 30) is None
    assert f"process {os.getpid()}" in (tmp_path / run_lock.LOCK).read_text()
    assert "another job" in (run_lock._take(tmp_path, 0.0) or "")


@pytest.mark.parametrize("occupied", ["directory", "file"])
def test_an_occupied_output_is_left_alone(tmp_path: Path, occupied: str) -> None:
    out = tmp_path / "out"
    if occupied == "directory":
        out.mkdir()
        (out / "precious").write_text("keep")
    else:
        out.write_text("keep")
    with pytest.raises(InputError, match="choose another directory"), new_directory(out):
        pytest.fail("must be refused before anything is written")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "precious" if occupied == "directory" else out).read_text() == "keep"


def test_an_empty_output_directory_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    (directory / "weights").mkdir(parents=True)
    (directory / "weights" / "__0_0.distcp").write_bytes(b"12345")
    contract = BlockContract(mask_token_id=64, block_size=4)
    write_manifest(directory, kind="model", dtype="fp32", block_contract=contract)
    return directory


def test_manifest_round_trip(saved: Path) -> None:
    assert read_manifest(saved) == Manifest(
        kind="model",
        dtype="fp32",
        block_contract=BlockContract(mask_token_id=64, block_size=4),
        files={"weights/__0_0.distcp": 5},
        sha256={"weights/__0_0.distcp": sha256_of(saved / "weights/__0_0.distcp")},
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json: its save was cut short"),
        (lambda d: (d / "weights/__0_0.distcp").write_bytes(b"123"), "has 3 bytes instead of 5"),
        (lambda d: (d / "weights/__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda d: (d / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda d: edit_json(d / "manifest.json", format="other/9"), "format='other/9'"),
        (lambda d: edit_json(d / "manifest.json", files=None), "is damaged"),
        (lambda d: edit_json(d / "manifest.json", kind="training"), "its checksum is another"),
        (shutil.rmtree, "is not a directory"),
    ],
)
def test_a_save_that_was_cut_short(
    saved: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(saved)
    with pytest.raises(InputError, match=reason):
        read_manifest(saved)


def truncate(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as opened:
        opened.truncate(90_000)


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


def test_commands_refuse_bad_input(
    monkeypatch: pytest.MonkeyPatch, model: Path, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refusals: list[tuple[Callable[[], None], list[object], str]] = [
        (import_hf.main, ["--hf", model], "--out"),
        (import_hf.main, ["--hf", model, "--out", model], "already holds files"),
        (import_hf.main, ["--hf", model, "--out", out, "--mask-token-id", 5], "ordinary token"),
        (import_hf.main, ["--hf", saved, "--out", out], "has no config.json"),
        (import_hf.main, ["--hf", model, "--out", out, "--dtype", "fp8"], "invalid choice"),
        (
            export_hf.main,
            ["--checkpoint", saved, "--out", out, "--format", "gguf"],
            "invalid choice",
        ),
        (
            export_hf.main,
            ["--checkpoint", saved, "--out", out, "--format", "qwen3"],
            "no directory|not a",
        ),
        (
            export_hf.main,
            ["--checkpoint", model, "--out", out, "--format", "qwen3"],
            "no Megatron",
        ),
        (serve_check.main, ["--hf", tmp_path / "nowhere"], "is not a directory"),
        (inspect.main, [tmp_path / "nowhere"], "is not a directory"),
    ]
    for main, arguments, reason in refusals:
        with pytest.raises(InputError, match=reason):
            run(monkeypatch, main, *arguments)
        assert not out.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it with torchrun"):
        run(monkeypatch, import_hf.main, "--hf", model, "--out", out)


@pytest.mark.parametrize("name", ["a2d-qwen3", "sdar"])
def test_formats_whose_readers_would_decode_otherwise(model: Path, name: str) -> None:
    def contract(**changes: object) -> BlockContract:
        return BlockContract(**{"mask_token_id": 64, "block_size": 4, **changes})

    shape = read_shape(model)
    check_format(name, contract(), shape)
    check_format("qwen3", contract(logit_shift=True), shape)
    for changes, reason in (
        ({"logit_shift": True}, "logit_shift=true"),
        ({"block_alignment": "response"}, "block_alignment=response"),
        ({"mask_token_id": None}, "has no mask token"),
    ):
        with pytest.raises(InputError, match=reason):
            check_format(name, contract(**changes), shape)


def test_a_mixture_of_experts_has_no_a2d_form(model: Path) -> None:
    experts = Experts(count=4, per_token=2, ffn=8, renormalize=True)
    shape = replace(read_shape(model), experts=experts, family=QWEN3_MOE)
    check_format("sdar", BlockContract(mask_token_id=64), shape)
    with pytest.raises(InputError, match=r"no mixture of experts.*; use --format sdar or qwen3"):
        check_format("a2d-qwen3", BlockContract(mask_token_id=64), shape)


def test_inspect_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    run(monkeypatch, inspect.main, model)
    said = capsys.readouterr().out
    assert f"parameters: {read_shape(model).parameters:,}\n" in said
    assert said.endswith("complete: yes\n")
    truncate(model)
    with pytest.raises(InputError, match="is truncated"):
        run(monkeypatch, inspect.main, model)
    assert capsys.readouterr().out.endswith("complete: no\n")


def test_exit_code_and_error_line(model: Path, tmp_path: Path) -> None:
    """The whole command: exit code 2, one line, and torch is not even imported."""
    truncate(model)
    command = [sys.executable, "-X", "importtime", "-m", "checkpoint_tools.import_hf"]
    arguments = ["--hf", str(model), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    assert not (tmp_path / "out").exists()
