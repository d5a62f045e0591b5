"""Claims: whatever is wrong with a Hugging Face directory is found before a tensor is read, and
said in one line with value, rule and remedy."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.export.safetensors_writer import write_weights
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.vocabulary import (
    end_tokens,
    forbidden_ids,
    known_mask_token,
    mask_token,
    pad_token,
)
from tests.tiny_models import edit_json, make_qwen3, make_tokenizer

SECOND_SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    make_qwen3(directory, tied=True, seed=1, layers=2, shards=2)
    assert (directory / SECOND_SHARD).is_file()
    return directory


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of one shard and keep the index true."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = file.parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    kept = {k: v for k, v in content["weight_map"].items() if v != file.name}
    content["weight_map"] = kept | dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps(content))


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


def some_name(file: Path, ending: str) -> str:
    return next(name for name in load_file(file) if name.endswith(ending))


def remove_tensor(directory: Path) -> None:
    rewrite(
        directory / SECOND_SHARD, lambda t: t.pop(some_name(directory / SECOND_SHARD, "weight"))
    )


def add_tensor(directory: Path) -> None:
    extra = {"model.layers.9.mlp.up_proj.weight": torch.zeros(3)}
    rewrite(directory / SECOND_SHARD, lambda t: t.update(extra))


def misshape_tensor(directory: Path) -> None:
    name = some_name(directory / SECOND_SHARD, "k_proj.weight")
    rewrite(directory / SECOND_SHARD, lambda t: t.update({name: torch.zeros(64, 63)}))


def store_integers(directory: Path) -> None:
    name = some_name(directory / SECOND_SHARD, "k_proj.weight")
    zeros = torch.zeros(64, 64, dtype=torch.int8)
    rewrite(directory / SECOND_SHARD, lambda t: t.update({name: zeros}))


def break_header(directory: Path) -> None:
    (directory / SECOND_SHARD).write_bytes(struct.pack("<Q", 4) + b"oops")


def escape_directory(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda d: truncate(d / SECOND_SHARD, 90_000), "is truncated: 90000 bytes"),
    "truncated header": (lambda d: truncate(d / SECOND_SHARD, 100), "is truncated .100 bytes"),
    "empty shard": (lambda d: truncate(d / SECOND_SHARD, 0), "is truncated"),
    "missing shard": (lambda d: (d / SECOND_SHARD).unlink(), f"lacks the shard {SECOND_SHARD}"),
    "broken header": (break_header, "broken header"),
    "missing tensor": (remove_tensor, "lacks model.layers"),
    "unexpected tensor": (add_tensor, r"holds model.layers.9.mlp.up_proj.weight which"),
    "wrong shape": (misshape_tensor, r"has shape \[64, 63\], but config.json makes it \[64, 64\]"),
    "integers": (store_integers, "stored as I8"),
    "index elsewhere": (escape_directory, "no valid weight_map"),
    "no index": (
        lambda d: (d / "model.safetensors.index.json").unlink(),
        "no model.safetensors.index",
    ),
    "broken json": (lambda d: (d / "config.json").write_text('{"model_type":'), "not valid JSON"),
    "json list": (lambda d: (d / "config.json").write_text("[]"), "holds a list"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "no family": (lambda d: edit_json(d / "config.json", model_type="gpt2"), "is no model that is"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(sharded: Path, case: str) -> None:
    spoil, reason = BAD_WEIGHTS[case]
    open_weights(sharded).close()
    spoil(sharded)
    with pytest.raises(InputError, match=reason) as caught:
        open_weights(sharded)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # a remedy follows the reason


def test_a_directory_without_weights(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        open_weights(tmp_path / "nowhere")
    for file in sharded.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match="has no weights"):
        open_weights(sharded)
    (sharded / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"only PyTorch .bin weights"):
        open_weights(sharded)


def test_a_tied_model_may_repeat_its_head_but_not_change_it(sharded: Path) -> None:
    file = next(
        f for f in sharded.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f)
    )
    embedding = load_file(file)["model.embed_tokens.weight"]
    rewrite(file, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    with open_weights(sharded) as weights:
        weights.check_tied_head()
        assert "lm_head.weight" not in weights.names()
    rewrite(file, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with open_weights(sharded) as weights, pytest.raises(InputError, match="differs from"):
        weights.check_tied_head()


def test_written_shards_are_read_again(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "written"
    out.mkdir()
    shutil.copy(sharded / "config.json", out)
    with open_weights(sharded) as weights:
        expected = {name: weights.get(name).bfloat16() for name in weights.names()}
        write_weights(out, weights.model_shape, expected.items(), "bf16", shard_bytes=60_000)
    with open_weights(out) as written:
        assert written.stored_dtype() == "bf16"
        assert len(written.files()) > 2
        assert all(torch.equal(written.get(name), expected[name]) for name in expected)


# --- ids with a role


def test_mask_token_sources(sharded: Path, tmp_path: Path) -> None:
    assert mask_token(sharded, 64) == 64
    assert known_mask_token(sharded) is None
    edit_json(sharded / "config.json", mask_token_id=60)  # as an import records it
    assert mask_token(sharded) == mask_token(sharded, 60) == 60
    with pytest.raises(
        InputError, match=r"mask_token_id=64, but .* was made with mask_token_id=60"
    ):
        mask_token(sharded, 64)
    make_tokenizer(mask_token="<|MASK|>").save_pretrained(sharded)
    with pytest.raises(
        InputError, match=r"config.json has mask_token_id=60, .* mask token '<\|MASK\|>' at 49"
    ):
        mask_token(sharded)
    edit_json(sharded / "config.json", mask_token_id=None)
    assert mask_token(sharded) == 49
    with pytest.raises(InputError, match=r"mask_token_id=64, but the tokenizer .* at 49"):
        mask_token(sharded, 64)
    assert forbidden_ids(sharded, 49) == tuple(range(49, 67))


@pytest.mark.parametrize("model_type", ["sdar", "a2d-qwen3"])
def test_a_mask_that_config_and_tokenizer_disagree_about(sharded: Path, model_type: str) -> None:
    """Claim: a model decoded with another mask than it was trained with would say nothing right, so
    neither is taken silently."""
    make_tokenizer(mask_token="<|MASK|>").save_pretrained(sharded)
    edit_json(sharded / "config.json", model_type=model_type, mask_token_id=60)
    for find in (mask_token, known_mask_token):
        with pytest.raises(
            InputError, match=r"mask_token_id=60, .* at 49; correct the one"
        ) as said:
            find(sharded)
        assert "\n" not in str(said.value)
    edit_json(sharded / "config.json", mask_token_id=49)
    assert mask_token(sharded) == known_mask_token(sharded) == 49


def test_of_several_usual_texts_the_recorded_one_is_the_mask(sharded: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|MASK|>", "<MASK>"], special_tokens=True)
    tokenizer.save_pretrained(sharded)
    assert mask_token(sharded) == 49
    edit_json(sharded / "config.json", mask_token_id=50)
    assert mask_token(sharded) == 50


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (None, r"no room for the usual mask token 151669 in vocab_size=67; .*mask_token_id=49"),
        (67, "no room for mask_token_id 67 in vocab_size=67"),
        (-1, "no room for mask_token_id -1"),
        (5, "mask_token_id=5 is the ordinary token '4'; use an unused id such as 49"),
        (48, r"is the ordinary token '<\|im_end\|>'"),
    ],
)
def test_no_room_for_the_mask_token(sharded: Path, override: int | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        mask_token(sharded, override)


def test_a_full_vocabulary_has_no_room(tmp_path: Path) -> None:
    directory = make_qwen3(tmp_path / "full", tied=True, seed=2, vocab=49, layers=1)
    make_tokenizer().save_pretrained(directory)
    with pytest.raises(InputError, match="every id is a token"):
        known_mask_token(directory)


def test_end_and_pad_tokens(sharded: Path) -> None:
    assert (end_tokens(sharded), pad_token(sharded)) == ([48, 46], 46)
    edit_json(sharded / "generation_config.json", eos_token_id=48, pad_token_id=None)
    assert end_tokens(sharded) == [48]
    edit_json(sharded / "generation_config.json", eos_token_id=[67])
    with pytest.raises(InputError, match="eos_token_id=67 is no id below vocab_size=67"):
        end_tokens(sharded)
    for file in (*sharded.glob("tokenizer*"), sharded / "generation_config.json"):
        file.unlink()
    edit_json(sharded / "config.json", eos_token_id=None)
    with pytest.raises(InputError, match="names no end token"):
        end_tokens(sharded)
    assert forbidden_ids(sharded, 60) == (60,)  # without a tokenizer all other ids may be drawn


def test_a_broken_tokenizer(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer does not load"):
        mask_token(sharded, 64)
