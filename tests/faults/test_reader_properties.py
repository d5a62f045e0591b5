"""Claims: whatever bytes a file holds, its reader gives a valid value or raises InputError, never
anything else; and what a writer writes, the reader reads back equal. Hypothesis draws the bytes,
the same ones in every run; ``FAULT_EXAMPLES=1000`` draws more.
"""

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoint_tools.export.safetensors_writer import plan_shards
from evaluation import jsonl
from megatron_opdlm.config import Config, flatten, load_config, to_yaml
from megatron_opdlm.data import rows
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files import writing
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.model_files.safetensors_dir import TensorEntry, read_header
from tests.faults.readers import MANIFEST, READERS, TREES, Reader

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
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


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
    writing.write_jsonl(path, items)
    assert jsonl.read_jsonl(path, "rows") == items
    assert [row.fields for row in rows.read_rows(path, "rows")] == items


def test_what_json_has_no_number_for_is_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    writing.write_jsonl(path, [{"a": float("inf"), "b": [float("nan"), 0.5]}])
    assert jsonl.read_jsonl(path, "rows") == [{"a": None, "b": [None, 0.5]}]


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
