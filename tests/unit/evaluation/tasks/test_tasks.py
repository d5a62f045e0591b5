"""Tasks: what is asked, what is graded as correct, and what bad data files say."""

import json

import pytest

from evaluation.grading.response import without_control_tokens
from evaluation.grading.text import after_last, is_one_of
from evaluation.tasks import get_task
from megatron_opdlm.errors import InputError


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#125", "125"),
        ("7+8+0=15,#1#125 ", "125"),  # the last marker counts
        ("#125\nand more", "125"),  # to the end of its line
        ("#\n125", "125"),  # the answer on the next line
        ("no answer", None),
        ("#", None),
        ("", None),
    ],
)
def test_text_after_the_last_marker(text, expected):
    """Hand-made cases of the extraction."""
    assert after_last(text, "#") == expected


def test_control_tokens_and_what_follows_the_end_are_cut():
    """A grader sees the text up to the first end token, without Qwen3's control tokens."""
    assert without_control_tokens("<|im_start|>#1<|im_end|>#2") == "#1"
    assert without_control_tokens("a<|endoftext|><|im_end|>") == "a"
    assert without_control_tokens("a < b |> c") == "a < b |> c"


def test_comparison_ignores_outer_white_space_only():
    """Case and inner spaces count; nothing extracted is never correct."""
    assert is_one_of(" 12 ", ["7", "12"])
    assert not is_one_of("Twelve", ["twelve"])
    assert not is_one_of("1 2", ["12"])
    assert not is_one_of(None, [""])


def test_addition_asks_one_user_turn_and_reads_the_number_after_the_hash(tmp_path):
    """The toy task grades the number after '#'; a response without one is wrong and flagged."""
    task = get_task("addition")
    write_rows(tmp_path / "addition.jsonl", [{"question": "57+68=", "answer": "125"}])
    [row] = task.load(tmp_path)
    assert task.prompt(row) == {"messages": [{"role": "user", "content": "57+68="}]}
    assert task.grade(row, "7+8+0=15,5+6+1=12,#125").correct
    assert not task.grade(row, "7+8+0=15,5+6+1=12,#1250").correct
    missing = task.grade(row, "7+8+0=15,5+6+1=12,125")
    assert (missing.correct, missing.extracted, missing.flags) == (False, None, ["no_answer"])


def test_exact_match_compares_the_whole_response_or_what_follows_a_marker(tmp_path):
    """Every way to ask is passed on as it is; lists of answers accept any of them."""
    rows = [
        {"question": "2+2=", "answer": ["4", "four"]},
        {"prompt": "2+3=", "answer": "5", "marker": "####"},
        {"prompt_ids": [3, 1, 2], "answer": "x"},
        {"messages": [{"role": "user", "content": "hi"}], "answer": "y"},
    ]
    write_rows(tmp_path / "mine.jsonl", rows)
    task = get_task("exact_match:mine")
    loaded = task.load(tmp_path)
    assert [list(task.prompt(row)) for row in loaded] == [
        ["messages"],
        ["prompt"],
        ["prompt_ids"],
        ["messages"],
    ]
    assert task.grade(loaded[0], " four\n").correct
    assert not task.grade(loaded[0], "it is four").correct
    assert task.grade(loaded[1], "it is #### 5\nbye").correct
    assert not task.grade(loaded[1], "5").correct


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "4"}, "row 1: needs exactly one of question, messages"),
        ({"question": "a", "prompt": "b", "answer": "4"}, "row 1: needs exactly one"),
        ({"question": "", "answer": "4"}, "row 1: 'question' must be a str that is not empty"),
        ({"question": "a"}, "row 1: 'answer' must be"),
        ({"question": "a", "answer": []}, "row 1: 'answer' must be"),
        ({"question": "a", "answer": 4}, "row 1: 'answer' must be"),
        ({"question": "a", "answer": "4", "marker": ""}, "row 1: 'marker' must be"),
    ],
)
def test_bad_rows_are_named_by_their_index(tmp_path, row, message):
    """The second row is bad: the error says so in one line."""
    write_rows(tmp_path / "exact_match.jsonl", [{"question": "2+2=", "answer": "4"}, row])
    with pytest.raises(InputError, match=message):
        get_task("exact_match").load(tmp_path)


def test_missing_data_names_the_wanted_file_and_how_to_get_it(tmp_path):
    """A newcomer reads which file is missing and which command writes it."""
    with pytest.raises(InputError, match=r"addition\.jsonl, which is missing; .*quickstart\.task"):
        get_task("addition").load(tmp_path)
    with pytest.raises(InputError, match=r"gsm8k\.jsonl, which is missing"):
        get_task("exact_match:gsm8k").load(tmp_path)


def test_malformed_json_names_the_line(tmp_path):
    """The line number is the file's, blank lines included."""
    (tmp_path / "addition.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n\n{oops\n')
    with pytest.raises(InputError, match="line 3: not JSON"):
        get_task("addition").load(tmp_path)
    (tmp_path / "addition.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no rows"):
        get_task("addition").load(tmp_path)


@pytest.mark.parametrize("name", ["adition", "exact_match:", "exact_match:../x", "gsm9k"])
def test_unknown_task_names_list_the_known_ones(name):
    """No name leaves the data directory; a mistyped one is corrected."""
    with pytest.raises(InputError, match="exact_match:NAME"):
        get_task(name)
