"""Where an output may lie."""

import sys
from pathlib import Path

import pytest

from checkpoint_tools import export_hf, import_hf
from evaluation import answer, sample
from launch.pipeline import main as pipeline
from megatron_opdlm import prepare_data, train
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.writing import check_outside
from tests.conftest import MASK, TinyModels


def test_outside_is_beside_or_above(tmp_path: Path):
    """Claim: links and dots are followed; a directory is inside itself."""
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for inside in (source, source / "a" / "b", tmp_path / "link" / "x", source / "a/../x"):
        with pytest.raises(InputError, match=r"--out .* lies in --hf .*; choose a place outside"):
            check_outside(inside, "--out", {"--hf": source})
    for outside in (tmp_path, tmp_path / "source2", source / "../x"):
        check_outside(outside, "--out", {"--hf": source, "--other": None})


COMMANDS = {
    "import": (import_hf.main, ["--hf", "{}", "--out", "{}/out", "--mask-token-id", str(MASK)]),
    "export": (export_hf.main, ["--checkpoint", "{}", "--out", "{}/out", "--format", "sdar"]),
    "sample": (sample.main, ["--model", "{}", "--prompts", "ROWS", "--out", "{}/out.jsonl"]),
    "answer": (answer.main, ["--model", "{}", "--prompts", "ROWS", "--out", "{}/out.jsonl"]),
    "prepare": (prepare_data.main, ["--source", "{}", "--tokenizer", "{}", "--out", "{}/o.jsonl"]),
    "pipeline": (
        pipeline,
        ["configs/tiny_cpu.yaml", "--hf", "{}", "--data", "{}", "--out", "{}/o"],
    ),
    "train": (train.main, ["model.path={}", "data.path=ROWS", "train.out={}/run", "--dry-run"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_inside_what_is_read_is_refused(
    name: str, models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Claim: by every command that reads a directory, before anything is written there."""
    main, arguments = COMMANDS[name]
    model, rows = models.hf("student", tied=True), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [1]}\n')
    words = [word.replace("{}", str(model)).replace("ROWS", str(rows)) for word in arguments]
    monkeypatch.setattr(sys, "argv", [name, *words])
    before = sorted(model.iterdir())
    with pytest.raises(InputError, match=r" lies in .*; choose a place outside"):
        main()
    assert sorted(model.iterdir()) == before
