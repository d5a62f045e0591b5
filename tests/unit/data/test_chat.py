"""Chat prompts as TRL, verl and chat services write them are asked as our own are."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evaluation.sample import read_prompts
from megatron_opdlm.data.dapo import is_dapo
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.errors import InputError
from megatron_opdlm.prompts import load_prompts
from tests.tiny_models import make_tokenizer

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "1+2"}]
PARTS = [
    {
        "role": "system",
        "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}],
    },
    {"role": "user", "content": [{"type": "text", "text": "1+2"}]},
]
FORMS = {
    "TRL and verl": {"prompt": CHAT, "reward_model": {"ground_truth": "3"}},
    "text parts": {"messages": PARTS},
    "text parts of a prompt": {"prompt": PARTS},
    "parts of plain text": {"messages": [{**turn, "content": [turn["content"]]} for turn in CHAT]},
    "JSON text": {"messages": json.dumps(CHAT)},
    "JSON text of a prompt": {"prompt": json.dumps(CHAT)},
    "fields without value": {"messages": [{**turn, "tool_calls": None} for turn in CHAT]},
}


def load(path: Path):
    limits = {"enable_thinking": False, "max_prompt_tokens": None, "vocab_size": 64}
    return load_prompts(path, make_tokenizer(), **limits).prompts


def write(path: Path, rows: list) -> Path:
    """The rows as the kind of file that the name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_of_a_chat_gives_the_same_prompt(tmp_path):
    """Claim: from JSONL and Parquet, training and evaluation.sample alike; what else the row holds
    is carried along."""
    (expected,) = load(write(tmp_path / "ours.jsonl", [{"messages": CHAT}]))
    for form, row in FORMS.items():
        for kind in ("jsonl", "parquet"):
            path = write(tmp_path / f"rows.{kind}", [row])
            (prompt,) = load(path)
            assert prompt.ids == expected.ids, (form, kind)
            assert set(prompt.extra) == set(row) - {"messages", "prompt"}, (form, kind)
            assert read_prompts(path) == [read_rows(path, "x")[0].fields], (form, kind)


def test_text_is_no_chat(tmp_path):
    """Claim: a prompt's text that is no list of messages stays text, brackets and all."""
    for text in ("[1, 2]", "[", "[]", '[{"role": "user"}]', "1+2"):
        (prompt,) = load(write(tmp_path / "rows.jsonl", [{"prompt": text}]))
        assert prompt.ids == make_tokenizer()(text, add_special_tokens=False)["input_ids"], text


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
REFUSED = [
    ({"messages": IMAGE}, "message 1 has a part of type 'image_url'; leave out rows"),
    ({"prompt": [1, 2]}, "prompt is a list of numbers; token ids go under prompt_ids"),
    ({"messages": "hi"}, "messages must be a list of at least one {role, content}"),
    ({"messages": "[{"}, "messages must be a list of at least one {role, content}"),
    ({"messages": [{"from": "human", "value": "hi"}]}, "rename from to role and value to content"),
    ({"messages": [{"role": "user", "content": " "}]}, "message 1, of the user, is empty; write"),
    ({"question": " \n"}, "question is empty; write"),
    ({"conversations": CHAT}, "this one has conversations; rename"),
]


@pytest.mark.parametrize(("row", "fragment"), REFUSED)
def test_what_cannot_be_taken_names_the_remedy(tmp_path, row, fragment):
    path = write(tmp_path / "rows.jsonl", [{"prompt_ids": [1]}, row])
    for read in (load, read_prompts):
        with pytest.raises(InputError) as caught:
            read(path)
        assert f"{path}: line 2: " in str(caught.value)
        assert fragment in str(caught.value)


def test_one_object_over_many_lines_is_a_row(tmp_path):
    """Claim: so are several of them; each is named by the line that it starts on."""
    path = tmp_path / "rows.json"
    rows = [{"messages": CHAT}, {"question": "7"}]
    path.write_text(json.dumps(rows[0], indent=2))
    assert [row.fields for row in read_rows(path, "x")] == rows[:1]
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows) + "\n")
    found = read_rows(path, "x")
    assert [row.fields for row in found] == rows
    first_lines = json.dumps(rows[0], indent=2).count("\n") + 1
    assert [row.place.rpartition(" ")[2] for row in found] == ["1", str(first_lines + 1)]
    path.write_text('{\n "a": 1\n')
    with pytest.raises(InputError, match=r"line 3: not valid JSON .*one object"):
        read_rows(path, "x")


def test_rows_of_verl_are_not_dapo(tmp_path):
    """Claim: the two columns of DAPO-Math-17k alone do not make a file that set."""
    row = {"prompt": CHAT, "reward_model": {"ground_truth": "3"}}
    assert not is_dapo(write(tmp_path / "verl.parquet", [row]))
    asked = "Solve the following math problem step by step.\n\nx\n\nRemember to put your answer"
    dapo = {**row, "prompt": [{"role": "user", "content": asked}]}
    assert is_dapo(write(tmp_path / "dapo.parquet", [dapo]))
