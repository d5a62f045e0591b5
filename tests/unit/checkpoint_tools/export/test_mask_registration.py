"""Claims: the mask token gets exactly its id in every kind of tokenizer file, with and without a
gap before it; no other token moves and no text is split differently."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint_tools.export.mask_registration import register_mask, write_for_transformers_4
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.vocabulary import load_tokenizer
from tests.tiny_models import make_tokenizer

TEXT = "the fox 1+2=3\n<|im_start|>user the<think></think><|im_end|>"


def write_like_qwen(directory: Path, tokenizer_class: str) -> int:
    """Files as Qwen3's repositories have them, with a small vocabulary; returns the highest id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox 1+2=3\n"] * 5, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    content = json.loads((directory / "tokenizer.json").read_text())
    added = {token.pop("id"): token for token in content["added_tokens"]}
    config = {
        "tokenizer_class": tokenizer_class,
        "added_tokens_decoder": {str(number): token for number, token in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    return max(added)


@pytest.mark.parametrize("gap", [0, 1, 8])
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "PreTrainedTokenizerFast", "characters"])
def test_the_mask_token_gets_its_id(tmp_path: Path, kind: str, gap: int) -> None:
    if kind == "characters":
        make_tokenizer().save_pretrained(tmp_path)
        highest = 48
    else:
        highest = write_like_qwen(tmp_path, kind)
    before = load_tokenizer(tmp_path)
    assert before is not None
    mask_id = highest + 1 + gap
    write_for_transformers_4(tmp_path)
    register_mask(tmp_path, mask_id)
    after = load_tokenizer(tmp_path)
    assert after is not None
    assert (after.mask_token, after.mask_token_id) == ("<|MASK|>", mask_id)
    assert after.get_vocab() == {**before.get_vocab(), "<|MASK|>": mask_id}
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after("the<|MASK|>1").input_ids.count(mask_id) == 1
    assert after.decode(after("the<|MASK|>1").input_ids) == "the<|MASK|>1"
    assert after.eos_token_id == before.eos_token_id
    register_mask(tmp_path, mask_id)  # nothing to do


def test_a_tokenizer_of_vocabulary_files_only(tmp_path: Path) -> None:
    mask_id = write_like_qwen(tmp_path, "Qwen2Tokenizer") + 1
    (tmp_path / "tokenizer.json").unlink()
    register_mask(tmp_path, mask_id)
    after = load_tokenizer(tmp_path)
    assert after is not None
    assert after.convert_tokens_to_ids("<|MASK|>") == after.mask_token_id == mask_id
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not isinstance(written.get("extra_special_tokens"), list)  # transformers 4 takes none
    assert written["tokenizer_class"] != "TokenizersBackend"
    assert set(written["additional_special_tokens"]) >= {"<|im_start|>", "<|im_end|>"}


def test_an_added_but_unregistered_mask_token_keeps_its_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    tokenizer.save_pretrained(tmp_path)
    register_mask(tmp_path, 49)
    after = load_tokenizer(tmp_path)
    assert after is not None
    assert (after.mask_token, after.mask_token_id) == ("<|mask|>", 49)


def test_an_id_that_is_taken(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="mask_token_id=5 cannot be named"):
        register_mask(tmp_path, 5)


def test_without_a_tokenizer_there_is_nothing_to_do(tmp_path: Path) -> None:
    register_mask(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
