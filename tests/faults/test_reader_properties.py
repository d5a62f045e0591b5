"""Claims: whatever bytes a file holds, its reader gives a valid value or raises InputError, never
anything else; and what a writer writes, the reader reads back equal. Hypothesis draws the bytes,
the same ones in every run; ``FAULT_EXAMPLES=1000`` draws more.
"""

import dataclasses
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoint_tools.manifest import FORMAT, Manifest, read_manifest
from checkpoint_tools.qwen3_shape import Qwen3Shape, read_shape
from checkpoint_tools.safetensors_dir import TensorEntry, read_header
from checkpoint_tools.safetensors_writer import plan_shards
from evaluation import jsonl
from evaluation.recipe import read_recipe
from evaluation.results import read_summary
from evaluation.score import read_predictions
from evaluation.tasks import get_task
from megatron_opdlm import rows
from megatron_opdlm.config import Config, flatten, load_config, to_yaml
from megatron_opdlm.errors import InputError
from megatron_opdlm.prompts import load_prompts
from megatron_opdlm.replay import read_states

EXAMPLES = int(os.environ.get("FAULT_EXAMPLES", "40"))  # a test

settings.register_profile(
    "readers",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
bounded = settings(settings.get_profile("readers"))
few = settings(bounded, max_examples=EXAMPLES // 4)  # a configuration takes milliseconds

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
PLAIN_JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
PROMPT = '{"prompt_ids": [1, 2], "response": "a", "domain": "math"}\n'
STATE = '{"prompt_ids": [1, 2], "response_ids": [3, 4], "masked": [1, 0]}\n'
PREDICTION = '{"index": 0, "responses": ["#2"], "finish_reason": ["stop"], "passes": [4]}\n'
ROW = {"task": "addition", "n": 1, "accuracy": 0.5, "stderr": None, "seconds": 1.0}
ROW |= {"tokens_per_denoising_step": 1.0, "tokens_per_forward": 1.0, "mean_response_tokens": 2.0}
ROW |= {"settings": {"mode": "ar", "model": "x"}}
MANIFEST = {"format": FORMAT, "kind": "model", "dtype": "fp32", "step": None, "files": {}}
MANIFEST |= {"block_contract": {"mask_token_id": 64, "block_size": 4}, "low_rank": None}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "rope_theta": 1e4}
MODEL = {"model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **SIZES}
RECIPE = "common: {max_new_tokens: 8}\nruns:\n- {name: a, tasks: [addition], samples: 2}\n"
HEADER = {"__metadata__": {}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def shard(header: object, data: int = 24) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


class Characters:
    """Stands for a tokenizer: one id a character."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [letter % 60 for letter in text.encode()]}


def prompts(path: Path) -> object:
    return load_prompts(
        path, Characters(), enable_thinking=False, max_prompt_tokens=9, vocab_size=60
    )


def of_directory(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: read(path.parent)


def is_rows(value: Any) -> bool:
    return bool(value) and all(isinstance(row, dict) for row in value)


def is_shape(value: Any) -> bool:
    return isinstance(value, Qwen3Shape) and value.parameters > 0 and value.rope_theta > 0


def is_header(value: Any) -> bool:
    return all(isinstance(e, TensorEntry) and 8 <= e.start <= e.stop for e in value.values())


def is_states(value: Any) -> bool:
    return all(len(r["masked"]) == len(r["response_ids"]) and r["prompt_ids"] for r in value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader, a file that it takes, and what its value must be."""

    file: str
    read: Callable[[Path], Any]
    good: bytes
    is_valid: Callable[[Any], bool]


READERS = {
    "rows.jsonl": Reader(
        file="a.jsonl",
        read=lambda p: rows.read_rows(p, "data.path"),
        good=PROMPT.encode() * 2,
        is_valid=bool,
    ),
    "rows.json": Reader(
        file="a.json",
        read=lambda p: rows.read_rows(p, "data.path"),
        good=f"[{PROMPT},\n {PROMPT}]".encode(),
        is_valid=bool,
    ),
    "rows.parquet": Reader(
        file="a.parquet",
        read=lambda p: rows.read_rows(p, "data.path"),
        good=b"PAR1 nothing PAR1",
        is_valid=bool,
    ),
    "prompts": Reader(
        file="a.jsonl",
        read=prompts,
        good=PROMPT.encode() * 2,
        is_valid=lambda found: all(0 < len(p.ids) <= 9 for p in found.prompts),
    ),
    "trajectories": Reader(
        file="a.jsonl",
        read=lambda p: read_states(p, 60, 9),
        good=STATE.encode() * 2,
        is_valid=is_states,
    ),
    "evaluation rows": Reader(
        file="a.json",
        read=lambda p: jsonl.read_rows(p, "task x:"),
        good=f"[{PROMPT}, {PROMPT}]".encode(),
        is_valid=is_rows,
    ),
    "predictions": Reader(
        file="a.jsonl",
        read=lambda p: read_predictions(p, get_task("addition"), 3),
        good=PREDICTION.encode() + PREDICTION.replace("0", "1").encode(),
        is_valid=lambda found: all(0 <= row["index"] < 3 and row["responses"] for row in found),
    ),
    "summary": Reader(
        file="summary.json",
        read=read_summary,
        good=json.dumps([ROW, ROW]).encode(),
        is_valid=lambda found: isinstance(found, list),
    ),
    "safetensors": Reader(
        file="model.safetensors", read=read_header, good=shard(HEADER), is_valid=is_header
    ),
    "config.json": Reader(
        file="config.json",
        read=of_directory(read_shape),
        good=json.dumps(MODEL).encode(),
        is_valid=is_shape,
    ),
    "manifest": Reader(
        file="manifest.json",
        read=of_directory(read_manifest),
        good=json.dumps(MANIFEST).encode(),
        is_valid=lambda found: isinstance(found, Manifest),
    ),
    "configuration": Reader(
        file="run.yaml",
        read=lambda p: load_config(p, []),
        good=b"train: {steps: 3, out: runs/x}\noptimizer:\n  lr: 1e-3\n",
        is_valid=lambda found: isinstance(found, Config),
    ),
    "recipe": Reader(
        file="recipe.yaml",
        read=read_recipe,
        good=RECIPE.encode(),
        is_valid=lambda found: bool(found),
    ),
}


def value_or_refusal(reader: Reader, directory: Path, content: bytes) -> None:
    path = directory / reader.file
    path.write_bytes(content)
    try:
        found = reader.read(path)
    except InputError as error:
        assert str(error).strip()
        return
    assert reader.is_valid(found), found


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(tmp_path: Path, name: str) -> None:
    """Otherwise the claims below would hold for a reader that refuses everything."""
    reader = READERS[name]
    if name == "rows.parquet":
        pytest.skip("its library writes it: tests/unit/test_prompts.py")
    (tmp_path / reader.file).write_bytes(reader.good)
    assert reader.is_valid(reader.read(tmp_path / reader.file))


@pytest.mark.parametrize("name", READERS)
@given(
    content=st.binary(max_size=80) | TEXT.map(str.encode) | ANY_JSON.map(json.dumps).map(str.encode)
)
@example(content=b"[" * 100_000)
@example(content=b'{"a":' * 100_000)
@example(content=b"9" * 5000)
@example(content=b'{"prompt": "\\ud800", "prompt_ids": [1]}')
@example(content=b"a: &a {b: *a}")
@example(content=b"train: &t {steps: *t}")
@example(content=b"runs: 2001-99-99")
@example(content=b"train: !!int x")
@example(content=b"? [a, b]\n: c")
@example(content=b"train: {1: 2, null: 3}")
@example(content=b"\xef\xbb\xbf{}")
@bounded
def test_any_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    value_or_refusal(READERS[name], tmp_path, content)


@pytest.mark.parametrize("name", READERS)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["byte", "cut", "twice", "splice"]))
@bounded
def test_a_good_file_with_changed_bytes(tmp_path: Path, name: str, seed: int, kind: str) -> None:
    good, draw = READERS[name].good, random.Random(seed)
    place, length = draw.randrange(len(good)), draw.randrange(1, 9)
    changed = {
        "byte": good[:place] + bytes([draw.randrange(256)]) + good[place + 1 :],
        "cut": good[:place],
        "twice": good[:place] + good[place : place + length] + good[place:],
        "splice": good[:place] + good[place + length :],
    }[kind]
    value_or_refusal(READERS[name], tmp_path, changed)


def replaced(value: Any, by: Any, draw: random.Random) -> Any:
    """A copy of a tree in which one node, drawn at random, is another value."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return by
    if isinstance(value, list):
        place = draw.randrange(len(value))
        return [replaced(v, by, draw) if i == place else v for i, v in enumerate(value)]
    place = draw.choice(list(value))
    return {k: replaced(v, by, draw) if k == place else v for k, v in value.items()}


TREES: dict[str, tuple[Any, Callable[[Any], bytes]]] = {
    "rows.jsonl": (json.loads(PROMPT), lambda tree: json.dumps(tree).encode()),
    "prompts": (json.loads(PROMPT), lambda tree: json.dumps(tree).encode()),
    "trajectories": (json.loads(STATE), lambda tree: json.dumps(tree).encode()),
    "predictions": (json.loads(PREDICTION), lambda tree: json.dumps(tree).encode()),
    "summary": ([ROW], lambda tree: json.dumps(tree).encode()),
    "config.json": (MODEL, lambda tree: json.dumps(tree).encode()),
    "manifest": (MANIFEST, lambda tree: json.dumps(tree).encode()),
    "safetensors": (HEADER, shard),
    "configuration": (
        dataclasses.asdict(Config()),
        lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode(),
    ),
    "recipe": (yaml.safe_load(RECIPE), lambda tree: yaml.safe_dump(tree).encode()),
}


@pytest.mark.parametrize("name", TREES)
@given(by=ANY_JSON, seed=st.integers(0, 2**32))
@bounded
def test_a_good_file_with_another_value_somewhere(
    tmp_path: Path, name: str, by: object, seed: int
) -> None:
    tree, write = TREES[name]
    changed = replaced(tree, by, random.Random(seed))
    value_or_refusal(READERS[name], tmp_path, write(changed))


@given(override=st.builds("{}={}".format, st.sampled_from(list(flatten(Config()))), TEXT) | TEXT)
@example(override="a[0]=1")
@example(override="train.=1")
@example(override=".=1")
@example(override="train..steps=1")
@example(override="optimizer.lr=" + "9" * 400)
@example(override="optimizer.lr=" + "9" * 5000)
@example(override="train.out=2001-99-99")
@example(override="train.out=!!int x")
@example(override="train.out=&a [*a]")
@example(override="train.out=" + "[" * 5000)
@example(override="train.out=${train.out}")
@bounded
def test_any_override(override: str) -> None:
    try:
        assert isinstance(load_config(None, [override]), Config)
    except InputError as error:
        assert str(error).strip()


@given(
    items=st.lists(st.dictionaries(TEXT, PLAIN_JSON, max_size=4), min_size=1, max_size=4).filter(
        lambda items: any(items)
    )
)
@bounded
def test_rows_come_back_as_they_were_written(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    jsonl.write_jsonl(path, items)
    assert jsonl.read_jsonl(path, "rows") == items
    assert [row.fields for row in rows.read_rows(path, "rows")] == items


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), max_size=12)


@given(
    path=NAMES,
    out=NAMES,
    lr=st.floats(1e-4, 1e3),
    steps=st.integers(1, 10**9),
    caps=st.dictionaries(NAMES.filter(bool), st.integers(1, 4000), max_size=3),
)
@few
def test_a_configuration_comes_back_as_it_was_written(
    tmp_path: Path, path: str, out: str, lr: float, steps: int, caps: dict[str, int]
) -> None:
    default = Config()
    config = dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, path=path.replace("$", "")),
        train=dataclasses.replace(default.train, out=out.replace("$", ""), steps=steps),
        optimizer=dataclasses.replace(default.optimizer, lr=lr),
        rollout=dataclasses.replace(default.rollout, max_new_tokens_by_domain=caps),
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml", []) == config


@given(
    sizes=st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from(["F32", "BF16"]),
    limit=st.integers(1, 300),
)
@bounded
def test_headers_come_back_as_they_were_planned(
    tmp_path: Path, sizes: dict[str, tuple[int, ...]], dtype: str, limit: int
) -> None:
    """Claim: the shards of any tensors are files that the reader finds whole, every tensor once."""
    found: dict[str, TensorEntry] = {}
    for part in plan_shards(sizes, dtype, limit):
        with (tmp_path / part.file).open("wb") as file:
            file.write(part.header)
            file.truncate(part.bytes)
        found |= read_header(tmp_path / part.file)
    assert {name: entry.shape for name, entry in found.items()} == sizes
    assert all(entry.dtype == dtype and entry.is_consistent() for entry in found.values())


def test_the_seal_is_over_the_content(tmp_path: Path) -> None:
    """Claim: a manifest with a seal is read only with the right one."""
    content = MANIFEST | {"sha256": {}}
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    for given_seal, accepted in ((seal, True), (seal[::-1], False)):
        (tmp_path / "manifest.json").write_text(json.dumps(content | {"seal": given_seal}))
        if accepted:
            assert read_manifest(tmp_path).files == {}
        else:
            with pytest.raises(InputError, match="is damaged"):
                read_manifest(tmp_path)
