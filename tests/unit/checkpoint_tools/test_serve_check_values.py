"""Claims: ``serve_check`` says what is wrong with values of kinds that no exporter writes, and
which end tokens a model needs."""

import shutil
from pathlib import Path

import pytest

from checkpoint_tools import serve_check
from checkpoint_tools.engines.demands import read_directory
from tests.exported import make_export
from tests.tiny_models import edit_json


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    return make_export(root, model_format="sdar", dtype="bf16")


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def states(directory: Path, check: str) -> list[tuple[str, str]]:
    """(problem, note) of every engine's finding of this name; the model is not loaded."""
    findings = list(serve_check.check(read_directory(directory), load=False))
    assert all(str(finding).count(" | ") >= 3 for finding in findings)
    found = [(finding.problem, finding.note) for finding in findings if finding.check == check]
    assert found
    return found


ODD_KEYS = {
    "rope_parameters": ("x", "rope_theta", "rope_parameters='x' is no JSON object"),
    "architectures": (5, "architecture", "Unknown diffusion LLM: 5"),
    "auto_map": ("x", "auto_map", "auto_map='x' is no JSON object"),
    "model_type": ([], "model type", "model_type=[]"),
    "quantization_config": ("x", "quantisation", "quantization_config='x' is no JSON object"),
    "torch_dtype": ([5], "weight type", ""),
    "block_size": ("4", "block contract", "block_size='4'"),
    "layer_types": ("x", "weights", "layer_types='x'"),
}
ODD_FILES = {
    "lmdeploy.args": (b"\xff\xfe--backend", "lmdeploy.args", "no text in UTF-8"),
    "sglang.yaml": (b"block_size: 2020-13-45", "sglang.yaml", "is no YAML"),
    "denoising.py": (b"\xff", "imports", "denoising.py is no Python file"),
    "generation_config.json": (b"[5]", "end tokens", "holds a list"),
    "tokenizer.json": (b"5", "mask token", "tokenizer does not load"),
    "added_tokens.json": (b"\xff\xff", "mask token", "can't decode byte 0xff"),
}


@pytest.mark.parametrize("name", [*ODD_KEYS, *ODD_FILES])
def test_values_of_other_kinds_are_findings(export: Path, name: str) -> None:
    """Claim: whatever a file holds, the table says what would break; no check ends in another
    error."""
    if name in ODD_KEYS:
        value, check, reason = ODD_KEYS[name]
        edit_json(export / "config.json", **{name: value})
    else:
        content, check, reason = ODD_FILES[name]
        (export / name).write_bytes(content)
    found = [problem for problem, _ in states(export, check) if problem]
    assert bool(found) == bool(reason)
    assert not reason or any(reason in problem for problem in found), found


@pytest.mark.parametrize(
    ("token", "ids", "problem", "note"),
    [
        ("<|im_end|>", [48, 46], "", ""),
        ("<|im_end|>", 46, r"lacks <|im_end|> (48)", ""),
        ("<|im_end|>", [48], r"lacks <|endoftext|> (46)", ""),
        ("<|endoftext|>", 46, "", "a base model's: <|im_end|> (48) does not end a response"),
        ("<|endoftext|>", [46, 48], "", ""),
        ("<|endoftext|>", 48, r"lacks <|endoftext|> (46)", ""),
        ("<|endoftext|>", [], "lacks <|endoftext|> (46)", ""),
    ],
)
def test_end_tokens_of_chat_and_base_models(
    export: Path, token: str, ids: object, problem: str, note: str
) -> None:
    """Claim: a Base model's one end token is enough for it; an instructed model needs both."""
    edit_json(export / "tokenizer_config.json", eos_token=token)
    edit_json(export / "generation_config.json", eos_token_id=ids)
    for found, beside in states(export, "end tokens"):
        assert problem in found and bool(problem) == bool(found)
        assert beside == note
