"""Claims: where every row of the vocabulary is a token, ``import_hf`` takes one that is named or
appends a row, the mean of the others; exports carry the grown vocabulary and their tokenizer knows
the mask
token; what cannot be a mask token is refused with what can."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_tools import export_hf, import_hf, verify
from checkpoint_tools.mask_choice import MaskChoice, choose_mask
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.model_files.vocabulary import mask_token, read_vocabulary
from tests.tiny_models import make_model

VOCABULARY = 52
RESERVED = ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]  # ids 49, 50, 51


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama whose tokenizer uses every row."""
    model = make_model(
        tmp_path / "model", "llama", tied=request.param, seed=5, vocab=VOCABULARY, layers=1
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(RESERVED, special_tokens=True)
    tokenizer.save_pretrained(model)
    assert len(tokenizer) == VOCABULARY
    return model


def exported(monkeypatch: pytest.MonkeyPatch, model: Path, *options: str) -> Path:
    checkpoint, out = model.with_name("checkpoint"), model.with_name("out")
    run(monkeypatch, import_hf.main, "--hf", model, "--out", checkpoint, *options)
    given = ("--checkpoint", checkpoint, "--out", out)
    run(monkeypatch, export_hf.main, *given, "--format", "a2d-llama")
    return out


def test_a_row_more(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(monkeypatch, full, "--add-mask-token")
    config = json.loads((out / "config.json").read_text())
    written = (config["vocab_size"], config["mask_token_id"], config["mask_token_added"])
    assert written == (VOCABULARY + 1, VOCABULARY, True)
    with open_weights(full) as before, open_weights(out) as after:
        for name in before.names():
            expected = before.get(name)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                mean = expected.double().mean(0, keepdim=True).float()
                expected = torch.cat([expected, mean])
            assert torch.equal(after.get(name), expected), name
    checkpoint = full.with_name("checkpoint")
    for directory in (out, checkpoint / "huggingface"):
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|MASK|>", VOCABULARY)
        assert read_vocabulary(directory).forbidden_ids == (VOCABULARY,)
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8)
    assert VOCABULARY not in made.tolist()[0]
    manifest = read_manifest(checkpoint)  # the model that it came from is still in it
    lines = list(verify.compare(full, checkpoint, manifest))
    assert [line.partition(":")[0] for line in lines] == ["weights", "logits", "tokens"]
    again = full.with_name("again")
    run(monkeypatch, import_hf.main, "--hf", out, "--out", again)
    assert json.loads((again / "huggingface" / "config.json").read_text())["mask_token_added"]


def test_a_token_by_name(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(monkeypatch, full, "--mask-token", RESERVED[1])
    assert mask_token(full.with_name("checkpoint") / "huggingface") == mask_token(out) == 50
    assert read_shape(out).vocab_size == VOCABULARY
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (RESERVED[1], 50)
    assert "mask_token_added" not in json.loads((out / "config.json").read_text())


def test_what_cannot_be_one(tmp_path: Path, full: Path) -> None:
    with pytest.raises(InputError, match=r"every id is a token: .* --mask-token TEXT.* --add-"):
        choose_mask(full)
    with pytest.raises(InputError, match=r"has no such token; name one .* --add-mask-token"):
        choose_mask(full, text="<|nothing|>")
    with pytest.raises(InputError, match=r"--mask-token <\|im_end\|> ends or pads .*id 48"):
        choose_mask(full, text="<|im_end|>")
    roomy = make_model(tmp_path / "roomy", "llama", tied=True, seed=5, layers=1)
    with pytest.raises(InputError, match="a row that is no token, 49; use --mask-token-id 49"):
        choose_mask(roomy, add=True)
    masked = make_model(
        tmp_path / "masked", "llama", tied=True, seed=5, layers=1, mask_token="<mask>"
    )
    for options in ({"add": True}, {"text": "a"}):
        with pytest.raises(InputError, match="has its mask token already, at 49; leave"):
            choose_mask(masked, **options)
    assert choose_mask(masked) == MaskChoice(id=49)
