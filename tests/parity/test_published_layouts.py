"""Claims: published SDAR and a2d directories import as they are, and their code is neither run nor
carried; a block contract that cannot be honoured is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoint_tools import export_hf, import_hf
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import LAYOUTS
from megatron_opdlm.model_files.huggingface_files import read_contract
from megatron_opdlm.model_files.manifest import read_manifest
from tests.tiny_models import edit_json, make_qwen3, make_tokenizer


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


# Keys of the published configurations that a plain Qwen3 has not (sizes stay the tiny model's).
PUBLISHED = {
    "a2d": {
        "model_type": "a2d-qwen3",
        "architectures": ["A2DQwen3LMHeadModel"],
        "auto_map": {
            "AutoConfig": "modeling_qwen3.A2DQwen3Config",
            "AutoModel": "modeling_qwen3.A2DQwen3Model",
            "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
        },
        "dtype": "bfloat16",
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "rope_parameters": None,
    },
    "sdar": {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "attn_implementation": "flex_attention",
        "block_size": 4,
        "mask_token_id": 49,
        "debug": False,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "micro_forward": False,
        "skip_checkpoint": False,
        "use_deepep": False,
        "rope_scaling": None,
        "rope_theta": 50000,
        "rope_parameters": None,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    },
}


def published(directory: Path, kind: str, mask: str, *, registered: bool) -> Path:
    """A directory as it is published: its keys, its own code, its mask token."""
    make_qwen3(directory, tied=kind == "a2d", seed=8, layers=1)
    edit_json(directory / "config.json", **PUBLISHED[kind])
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(mask_token=mask if registered else None)
    if not registered:
        tokenizer.add_tokens([mask], special_tokens=True)
    tokenizer.save_pretrained(directory)
    code = ["tokenization_qwen2.Qwen2Tokenizer", None]
    edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": code})
    (directory / "modeling_sdar.py").write_text("raise SystemExit('foreign code ran')\n")
    return directory


@pytest.mark.parametrize(
    ("kind", "mask", "registered", "block_size"),
    [
        ("a2d", "<|mask|>", True, None),
        ("sdar", "<|MASK|>", True, 4),
        ("sdar", "<MASK>", False, 4),
    ],
)
def test_published_directories_import_as_they_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    mask: str,
    registered: bool,
    block_size: int | None,
) -> None:
    source = published(tmp_path / "source", kind, mask, registered=registered)
    run(monkeypatch, import_hf.main, "--hf", source, "--out", tmp_path / "checkpoint")
    contract = read_manifest(tmp_path / "checkpoint").block_contract
    assert (contract.mask_token_id, contract.block_size) == (49, block_size)
    out = tmp_path / "out"
    given = ("--checkpoint", tmp_path / "checkpoint", "--out", out)
    run(monkeypatch, export_hf.main, *given, "--format", "sdar")
    config = json.loads((out / "config.json").read_text())
    assert "attn_implementation" not in config
    assert config["auto_map"] == LAYOUTS["sdar"].auto_map
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (mask, 49)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"clean_context": "causal", "logit_shift": True}, "clean_context='causal'"),  # I-DLM
        ({"block_alignment": "response"}, "block_alignment='response'"),
        ({"block_alignment": "middle", "model_type": "qwen3"}, "block_alignment='middle'"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": "4"}, "block_size='4'"),
        ({"logit_shift": 1}, "logit_shift=1"),
    ],
)
def test_a_contract_that_cannot_be_honoured(keys: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_contract({"model_type": "sdar", **keys}, 49)


def test_what_is_recorded_is_read() -> None:
    keys = {"model_type": "sdar", "block_size": 8, "logit_shift": True}
    contract = read_contract(keys, 49)
    assert (contract.block_size, contract.logit_shift) == (8, True)
    plain = read_contract({"model_type": "qwen3", "block_alignment": "response"}, 49)
    assert plain.block_alignment == "response"
