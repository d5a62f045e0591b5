"""Model directories that are not what they should be, as people come by them: one line with value,
rule and remedy, exit code 2, and nothing written.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

from tests.conftest import MASK
from tests.faults.refusals import Runner
from tests.faults.spoiling import (
    LFS_POINTER,
    UP,
    Q,
    Spoil,
    config,
    fp8,
    generation,
    gptq,
    header,
    literal,
    only,
    overlap,
    self_link,
    tensors,
    tokenizer_beyond,
    write,
)
from tests.tiny_models import make_qwen3

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    make_qwen3(directory, tied=True, seed=1, layers=1)
    return directory


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


# What is done to a good directory -> what import_hf says.
IMPORT: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "gemma": (config(model_type="gemma3"), ("'gemma3' is no model that is built", "use")),
    "qwen3-vl": (config(model_type="qwen3_vl"), ("'qwen3_vl' is no model that is built", "use")),
    "qwen3-next": (config(model_type="qwen3_next"), ("'qwen3_next' is no model", "use")),
    "weights of another family": (config(model_type="llama"), ("which a Llama of its", "use")),
    "no model type": (config(model_type=None), ("model_type=None",)),
    "awq": (config(quantization_config={"quant_method": "awq"}), ("quantised", "use")),
    "gptq": (config(quantization_config={"quant_method": "gptq"}), ("quantised",)),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), ("quantised",)),
    "gptq tensors": (tensors(gptq), ("lacks", "q_proj.weight", "copy")),
    "fp8 tensors": (tensors(fp8), ("q_proj.weight_scale_inv", "use")),
    "gguf only": (only("model-Q4_K_M.gguf", b"GGUF\x03"), ("has no weights", "needs")),
    "gguf renamed": (write("model.safetensors", b"GGUF\x03" + bytes(90)), ("GGUF file", "use")),
    "bin only": (only("pytorch_model.bin", b"PK\x03\x04"), (r"only PyTorch \.bin", "needs")),
    "bin renamed": (write("model.safetensors", b"PK\x03\x04" + bytes(90)), ("PyTorch", "use")),
    "lfs weights": (write("model.safetensors", LFS_POINTER), ("Git LFS pointer", "git lfs pull")),
    "lfs config": (write("config.json", LFS_POINTER), ("Git LFS pointer", "git lfs pull")),
    "lfs tokenizer": (write("tokenizer.json", LFS_POINTER), ("Git LFS pointer", "git lfs pull")),
    "web page": (write("config.json", "<!DOCTYPE html><html>404"), ("web page", "download")),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ("has no weights", "needs")),
    "empty weights": (write("model.safetensors", b""), ("truncated", "copy it again")),
    "header of 2^63 bytes": (
        write("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
        ("truncated", "copy it again"),
    ),
    "header that is no JSON": (
        write("model.safetensors", struct.pack("<Q", 4) + b"oops"),
        ("broken header", "copy it again"),
    ),
    "header nested without end": (
        write("model.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000),
        ("broken header",),
    ),
    "offsets beyond 64 bits": (
        header(lambda h: h[Q].update(data_offsets=[0, 2**70])),
        ("broken header",),
    ),
    "negative offsets": (header(lambda h: h[Q].update(data_offsets=[-8, 0])), ("broken header",)),
    "offsets in words": (
        header(lambda h: h[Q].update(data_offsets=["0", "8"])),
        ("broken header",),
    ),
    "one offset": (header(lambda h: h[Q].update(data_offsets=[0])), ("broken header",)),
    "negative size": (header(lambda h: h[Q].update(shape=[-128, -64])), ("broken header",)),
    "overlapping tensors": (header(overlap), ("broken header", "copy it again")),
    "type without a name": (header(lambda h: h[Q].update(dtype=["F32"])), ("broken header",)),
    "integers": (header(lambda h: h[Q].update(dtype="I32")), ("stored as I32", "unquantised")),
    "wider type": (header(lambda h: h[Q].update(dtype="F16")), ("bytes of .*q_proj",)),
    "bytes after the end": (
        lambda d: (d / "model.safetensors").open("ab").write(b"x"),
        ("trailing bytes", "copy it again"),
    ),
    "half a copy": (
        lambda d: (d / "model.safetensors").open("r+b").truncate(99_999),
        ("is truncated: 99999 bytes", "copy it again"),
    ),
    "a tensor less": (tensors(lambda t: t.pop(UP)), ("lacks .*up_proj", "copy")),
    "a tensor more": (
        tensors(lambda t: t.update({"visual.patch_embed.weight": torch.ones(3)})),
        ("holds visual.patch_embed.weight", "use"),
    ),
    "tied by name only": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(67, 64)})),
        ("tie_word_embeddings=true, but", "set"),
    ),
    "untied without a head": (config(tie_word_embeddings=False), (r"lacks lm_head\.weight",)),
    "index without shards": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: SHARD}})),
        ),
        (f"lacks the shard {SHARD}", "copy it again"),
    ),
    "config as a list": (write("config.json", "[]"), ("holds a list", "copy it again")),
    "empty config": (write("config.json", ""), ("config.json is not valid JSON", "copy")),
    "config in UTF-16": (write("config.json", "{}".encode("utf-16")), ("UTF-16", "UTF-8")),
    "config nested without end": (write("config.json", "[" * 200_000), ("not valid JSON",)),
    "config is a directory": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        ("has no config.json", "give"),
    ),
    "config links to itself": (self_link("config.json"), ("has no config.json", "give")),
    "weights link to themselves": (self_link("model.safetensors"), ("it needs model.safetensors",)),
    "number in quotes": (config(hidden_size="64"), ("hidden_size='64' is not a positive",)),
    "number with a point": (config(num_hidden_layers=1.0), ("num_hidden_layers=1.0", "correct")),
    "true for a number": (config(num_attention_heads=True), ("num_attention_heads=True",)),
    "no layers": (config(num_hidden_layers=0), ("num_hidden_layers=0", "correct")),
    "negative vocabulary": (config(vocab_size=-67), ("vocab_size=-67", "correct")),
    "a trillion layers": (config(num_hidden_layers=10**12), ("beyond any model", "correct")),
    "missing size": (config(intermediate_size=None), ("has no intermediate_size",)),
    "layers of another config": (config(num_hidden_layers=2), ("lacks model.layers.1", "copy")),
    "width of another config": (config(hidden_size=128), ("has shape", r"\[67, 128\]", "use")),
    "groups that do not divide": (config(num_key_value_heads=3), ("does not divide", "3")),
    "rope_theta NaN": (
        literal("rope_parameters", '{"rope_theta": NaN}'),
        ("rope_theta=nan", "correct"),
    ),
    "rope_theta infinite": (
        literal("rope_parameters", '{"rope_theta": 1e999}'),
        ("rope_theta=inf", "correct"),
    ),
    "rms_norm_eps NaN": (literal("rms_norm_eps", "NaN"), ("rms_norm_eps=nan", "correct")),
    "rms_norm_eps of 400 digits": (config(rms_norm_eps=10**400), ("rms_norm_eps=1000", "correct")),
    "integer of 5000 digits": (literal("vocab_size", "9" * 5000), ("not valid JSON",)),
    "longrope": (
        config(rope_scaling={"rope_type": "longrope", "factor": 4}),
        ("longrope", "remove"),
    ),
    "layer types in words": (config(layer_types="full"), ("layer_types='full'", "correct")),
    "tie in words": (config(tie_word_embeddings="yes"), ("tie_word_embeddings='yes'", "correct")),
    "end token beyond": (generation(eos_token_id=67), ("eos_token_id=67", "vocab_size=67")),
    "end token as text": (generation(eos_token_id="</s>"), ("eos_token_id='</s>'", "correct")),
    "padding beyond": (generation(pad_token_id=-1), ("pad_token_id=-1", "correct")),
    "generation config cut": (write("generation_config.json", '{"eos'), ("not valid JSON", "copy")),
    "mask beyond": (config(mask_token_id=67), ("mask_token_id 67", "vocab_size=67")),
    "mask as text": (config(mask_token_id="<mask>"), ("'<mask>'", "vocab_size=67")),
    "mask is a letter": (config(mask_token_id=20), ("ordinary token", "use an unused id")),
    "tokenizer is empty": (write("tokenizer.json", ""), ("tokenizer does not load", "copy")),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), ("tokenizer does not load", "copy")),
    "tokenizer cut": (
        lambda d: (d / "tokenizer.json").open("r+b").truncate(700),
        ("tokenizer does not load", "copy"),
    ),
    "tokenizer of a larger model": (
        tokenizer_beyond,
        ("tokenizer", "id 88", "vocab_size=67", "use"),
    ),
    "causal model under SDAR's name": (
        config(model_type="sdar", clean_context="causal"),
        ("clean_context='causal'", "use"),
    ),
    "block size in words": (config(block_size="four"), ("block_size='four'", "correct")),
}


@pytest.mark.parametrize("case", IMPORT)
def test_import(runner: Runner, model: Path, tmp_path: Path, case: str) -> None:
    spoil, patterns = IMPORT[case]
    spoil(model)
    out = tmp_path / "out"
    runner.refuses(tmp_path, "import_hf", "--hf", model, "--out", out, patterns=patterns)


SPOILT_FOR_ALL = ("gemma", "lfs weights", "half a copy", "empty config", "rope_theta NaN")


@pytest.mark.parametrize("case", SPOILT_FOR_ALL)
def test_every_command_that_reads_a_model(
    runner: Runner, model: Path, tmp_path: Path, case: str
) -> None:
    """Claim: whoever reads the directory says the same."""
    spoil, patterns = IMPORT[case]
    spoil(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [1], "response_ids": [2], "masked": [1]}\n')
    tasks = tmp_path / "data"
    tasks.mkdir()
    (tasks / "addition.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    out = tmp_path / "out"
    decode = ["--model", model, "--out", out, "--mask-token-id", MASK]
    for command in (
        ["inspect", model],
        ["sample", *decode, "--prompts", rows],
        ["run", *decode, "--tasks", "addition", "--data", tasks],
        ["train", f"model.path={model}", f"data.path={rows}", f"train.out={out}"],
        ["replay", "--student", model, "--teacher", model, "--trajectories", rows, "--out", out],
    ):
        runner.refuses(tmp_path, *command, patterns=patterns)


@pytest.mark.parametrize("kind", ["level above", "a file of it", "nowhere", "not unpacked"])
def test_wrong_places(runner: Runner, model: Path, tmp_path: Path, kind: str) -> None:
    """Claim: a path beside the model's is refused with what was looked for there."""
    places = {
        "level above": (model.parent, "has no config.json"),
        "a file of it": (model / "model.safetensors", "is not a directory"),
        "nowhere": (tmp_path / "nowhere", "is not a directory"),
        "not unpacked": (tmp_path / "model.tar.gz", "is not a directory"),
    }
    (tmp_path / "model.tar.gz").write_bytes(b"\x1f\x8b")
    path, reason = places[kind]
    arguments = ["--hf", path, "--out", tmp_path / "out"]
    runner.refuses(tmp_path, "import_hf", *arguments, patterns=(reason, "give"))
    runner.refuses(tmp_path, "inspect", path, patterns=(reason, "give"))


def test_what_looks_odd_but_is_right(runner: Runner, model: Path, tmp_path: Path) -> None:
    """Claim: blanks and letters of other alphabets in names, a byte order mark, fp16 weights, a
    repeated tied head and a missing tokenizer are no faults."""
    odd = Path(shutil.copytree(model, tmp_path / "my modèl 模型 'x'"))
    (odd / "config.json").write_text("\ufeff" + (odd / "config.json").read_text())
    tensors(lambda t: t.update({name: x.half() for name, x in t.items()}))(odd)
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(odd)
    for file in odd.glob("tokenizer*"):
        file.unlink()
    code, stderr = runner("import_hf", "--hf", odd, "--out", tmp_path / "é out", "--quiet")
    assert code == 0, stderr
    assert runner("inspect", tmp_path / "é out")[0] == 0
