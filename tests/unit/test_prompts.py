"""Every kind of data file gives the same prompts; every malformed row is named by file and line."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from launch.quickstart.teacher import build_tokenizer
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.errors import InputError
from megatron_opdlm.prompts import PromptOrder, PromptSet, load_prompts, render
from tests.tiny_models import make_tokenizer

ROWS = [
    {"question": "1+2", "domain": "math", "level": 3},
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
    {"prompt_ids": [3, 1, 4], "response": "15"},
    {"question": "7", "system": "add", "prompt": "carried"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(path: Path, tokenizer, limit: int | None = None, vocab_size: int = 64) -> PromptSet:
    return load_prompts(
        path,
        tokenizer,
        enable_thinking=False,
        max_prompt_tokens=limit,
        vocab_size=vocab_size,
    )


def test_rows_of_every_form(tmp_path, tokenizer):
    prompts = load(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer).prompts
    question, messages, ids, system = prompts
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3]

    def user(text: str) -> str:
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n--\n"

    assert tokenizer.decode(question.ids) == user("1+2")
    assert question.domain == "math"
    assert question.extra == {"level": 3}
    assert tokenizer.decode(messages.ids) == "<|im_start|>system\nbe kind<|im_end|>\n" + user("hi")
    assert messages.domain is None
    assert messages.response_ids is None
    assert ids.ids == [3, 1, 4]
    assert tokenizer.decode(ids.response_ids) == "15"
    assert tokenizer.decode(system.ids) == "<|im_start|>system\nadd<|im_end|>\n" + user("7")
    assert system.extra == {"prompt": "carried"}


def test_thinking_flag_reaches_the_template(tokenizer):
    plain = render({"question": "7"}, tokenizer, False)
    thinking = render({"question": "7"}, tokenizer, True)
    assert tokenizer.decode(plain) == tokenizer.decode(thinking) + "--\n"


def test_prompt_text_is_tokenised_as_it_stands(tokenizer):
    assert tokenizer.decode(render({"prompt": "1+2="}, tokenizer, False)) == "1+2="


def test_every_kind_of_file_gives_the_same_prompts(tmp_path, tokenizer):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{i}+{i}", "domain": "math" if i % 2 else None} for i in range(5)]
    expected = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer).prompts
    assert [prompt.domain for prompt in expected] == [None, "math", None, "math", None]

    (tmp_path / "pretty.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("pretty.json", "lines.json", "a.parquet", "saved"):
        assert load(tmp_path / name, tokenizer).prompts == expected, name


def test_long_prompts_are_skipped_and_counted_without_shifting_their_neighbours(
    tmp_path, tokenizer
):
    rows = [{"prompt_ids": [1] * n, "tag": n} for n in (3, 6, 5, 7, 2)]
    found = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, limit=5)
    assert found.skipped == 2
    assert [(p.index, len(p.ids), p.extra["tag"]) for p in found.prompts] == [
        (0, 3, 3),
        (2, 5, 5),
        (4, 2, 2),
    ]
    with pytest.raises(InputError, match=r"all 5 prompts are longer than the limit of 1 .*has 2"):
        load(tmp_path / "a.jsonl", tokenizer, limit=1)


def test_blank_lines_byte_order_mark_and_unicode_separators_are_read(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"prompt_ids": [1], "t": "a\u2028b"}\r\n\n  \n{"prompt_ids": [2]}')
    prompts = load(file, tokenizer).prompts
    assert [(p.index, p.ids) for p in prompts] == [(0, [1]), (1, [2])]
    assert prompts[0].extra == {"t": "a\u2028b"}


def test_rows_name_the_line_they_start_on(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n  {"a": 1},\n  {"b":\n   2}, {"c": 3},\n\n  {"d": "x\\ny"}\n]\n')
    places = [row.place.rpartition(": ")[2] for row in read_rows(file, "data.path")]
    assert places == ["line 2", "line 3", "line 4", "line 6"]
    assert [row.fields for row in read_rows(file, "data.path")] == json.loads(file.read_text())


BAD_ROWS = [
    ({"text": "hi"}, "a row needs messages, question or prompt_ids; this one has text"),
    ({}, "this one has nothing"),
    ({"question": None}, "this one has nothing"),
    ({"question": "a", "prompt_ids": [1]}, "a row has question or prompt_ids, not both"),
    ({"question": 3}, "question must be text, not int"),
    ({"question": "a", "domain": ["math"]}, "domain must be text, not list"),
    ({"question": "a", "response": 7}, "response must be text, not int"),
    ({"prompt_ids": [1], "system": "a"}, "'system' goes with 'question', not with 'prompt_ids'"),
    ({"prompt_ids": "1 2"}, "prompt_ids must be a list of token ids"),
    ({"prompt_ids": [1, 2.0]}, "prompt_ids must be a list of token ids"),
    ({"prompt_ids": [1, True]}, "prompt_ids must be a list of token ids"),
    ({"prompt_ids": []}, "the prompt is empty"),
    ({"prompt_ids": [1, 64]}, "token id 64 is not in the model's vocabulary; ids are 0 to 63"),
    ({"prompt_ids": [-1]}, "integers from 0"),
    ({"messages": []}, "messages must be a list of at least one {role, content}"),
    ({"messages": "hi"}, "messages must be a list"),
    ({"messages": [{"role": "user"}]}, "message 1 must have role and content, both text"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 5}]},
        "message 2 must have role and content, both text",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "messages end with the assistant's; end with the user's",
    ),
    ([1, 2], "a row must be a JSON object, not [1, 2]"),
    ("text", 'a row must be a JSON object, not "text"'),
]


@pytest.mark.parametrize(("row", "fragment"), BAD_ROWS)
def test_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, row, fragment):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt_ids": [1]}, {"prompt_ids": [2]}, row])
    with pytest.raises(InputError) as caught:
        load(file, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"data.path={file}: line 3: ")
    assert fragment in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.jsonl", b"", "the file holds no rows"),
        ("a.jsonl", b"\n\n", "the file holds no rows"),
        ("a.json", b"[]", "the file holds no rows"),
        ("a.jsonl", b'{"prompt_ids": [1]}\n{"prompt_ids": [2]\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"prompt_ids": [1]}\n\xff\xfe\n', "line 2: not UTF-8 text"),
        ("a.json", b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', "line 3: not valid JSON"),
        ("a.json", b'[{"a": 1},\n {"a": 2},\n', "line 3: not valid JSON"),
        ("a.json", b'[{"a": 1}] x', "line 1: not valid JSON"),
        ("a.json", b"[", "line 1: not valid JSON"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.csv", b"a,b\n", "unknown kind of file '.csv'"),
    ],
)
def test_malformed_file_is_refused(tmp_path, tokenizer, name, content, fragment):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(file, tokenizer)
    assert str(caught.value).startswith(f"data.path={file}: ")
    assert fragment in str(caught.value)


def test_paths_that_hold_no_data_file_are_refused(tmp_path, tokenizer):
    import datasets

    with pytest.raises(InputError, match="no such file or directory"):
        load(tmp_path / "nowhere.jsonl", tokenizer)
    with pytest.raises(InputError, match="not a directory written by datasets"):
        load(tmp_path, tokenizer)
    split = datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(InputError, match="holds the splits train, test"):
        load(tmp_path / "both", tokenizer)
    assert len(load(tmp_path / "both" / "train", tokenizer).prompts) == 1


def test_tokenizer_without_a_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt_ids": [1]}, {"question": "a"}])
    with pytest.raises(InputError, match=r"line 2: .*no chat template"):
        load(file, tokenizer)
    assert render({"prompt": "12"}, tokenizer, False) == tokenizer("12")["input_ids"]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"question": "a"}, "give prompt_ids in its place"),
        ({"messages": [{"role": "user", "content": "a"}]}, "give prompt_ids in its place"),
        ({"prompt": "a"}, "give prompt_ids in its place"),
        ({"prompt_ids": [2], "response": "a"}, "or remove it"),
    ],
)
def test_model_without_a_tokenizer(tmp_path, row, remedy):
    """Claim: rows of ids need none; a row with text is named, with its key and the remedy."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt_ids": [1]}, row])
    with pytest.raises(InputError, match=f"line 2: the model has no tokenizer to read .*{remedy}$"):
        load(file, None)
    assert load(write_jsonl(file, [{"prompt_ids": [1]}]), None).prompts[0].ids == [1]


def test_template_that_refuses_the_messages(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "a"}])
    with pytest.raises(InputError, match=r"line 1: .*refuses these messages: roles must alternate"):
        load(file, tokenizer)


def test_vocabulary_smaller_than_the_tokenizers(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "a"}])
    with pytest.raises(InputError, match=r"line 1: token id \d+ is not in the model's vocabulary"):
        load(file, tokenizer, vocab_size=20)


def order(n: int = 10, chunk: int = 4, epochs: int = 3, seed: int = 5, shuffle: bool = True):
    return PromptOrder(n=n, prompts_per_step=chunk, epochs=epochs, seed=seed, shuffle=shuffle)


def test_each_epoch_visits_every_prompt_once():
    visits = [position for step in range(1, 16) for position in order().batch(step)]
    for epoch in range(6):
        assert sorted(visits[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert visits[:10] != visits[10:20]


def test_short_last_chunk_is_filled_from_the_next_epoch():
    # 61,816 rows by 128: 483 steps, the last with 120 rows of this epoch and 8 of the next
    long = order(n=61_816, chunk=128, epochs=1)
    assert long.total_steps == 483
    counts = Counter(position for step in range(1, 484) for position in long.batch(step))
    assert sorted(Counter(counts.values()).items()) == [(1, 61_808), (2, 8)]
    repeated = {position for position, count in counts.items() if count == 2}
    assert set(long.batch(483)[120:]) == repeated


def test_order_has_no_state_and_ignores_the_global_generator():
    random.seed(1)
    forward = [order().batch(step) for step in range(1, 9)]
    random.seed(2)
    backward = [order().batch(step) for step in range(8, 0, -1)]
    assert forward == backward[::-1]


def test_order_depends_on_the_seed():
    assert order(n=100, seed=1).batch(1) != order(n=100, seed=2).batch(1)


def test_order_without_shuffling_is_the_files():
    plain = order(n=5, chunk=3, epochs=2, shuffle=False)
    assert plain.total_steps == 4
    assert [plain.batch(s) for s in (1, 2, 3, 4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_fewer_prompts_than_a_step_takes():
    assert order(n=2, chunk=5, shuffle=False).batch(1) == [0, 1, 0, 1, 0]
    assert order(n=2, chunk=5).total_steps == 3


def test_order_is_the_same_on_every_machine_and_version():
    """Pinned: a run that is resumed after an upgrade goes on with the same data."""
    assert order(n=10, chunk=10, seed=10086).batch(1) == PINNED_ORDER


PINNED_ORDER = [6, 0, 8, 3, 5, 7, 9, 4, 2, 1]


def test_a_character_without_a_token_is_an_input_error():
    """Claim: where a tokenizer has no token for the unknown, as the quickstart's, that is said."""
    with pytest.raises(InputError, match=r"cannot read 'question'.*use characters that it knows"):
        render({"question": "hello"}, build_tokenizer(), False)
    assert render({"question": "1+2="}, build_tokenizer(), False)
