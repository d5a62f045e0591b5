"""IFEval: lm-eval's checkers on clean text, without a network, the same on every run."""

import json
import random
import socket

import pytest

from evaluation.grading.instructions import check_instructions, known_instructions
from evaluation.score import score
from evaluation.tasks import get_task
from megatron_opdlm.errors import InputError

TWO = {"num_sentences": 2, "relation": "at least"}
TEXT = "eeee tttt aaaa"  # four times three letters
CAPITALS = {"capital_frequency": 2, "capital_relation": "at least"}

# instruction, its arguments, response, strict, loose
CASES = [
    ("punctuation:no_comma", {}, "No comma here.", True, True),
    ("punctuation:no_comma", {}, "Well, no.", False, False),
    ("startend:quotation", {}, '"All of it."', True, True),
    ("startend:quotation", {}, 'Not "all" of it.', False, False),
    ("startend:end_checker", {"end_phrase": "Bye now."}, "So long. Bye now.", True, True),
    ("startend:end_checker", {"end_phrase": "Bye now."}, "Bye now. Or not?", False, False),
    ("detectable_format:json_format", {}, '{"a": 1}', True, True),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', True, True),
    ("detectable_format:json_format", {}, '{"a": 1', False, False),
    ("change_case:english_capital", {}, "THIS IS AN ENGLISH SENTENCE ABOUT THE WEATHER.", True, 1),
    ("change_case:english_lowercase", {}, "this is an english sentence about it.", True, True),
    ("change_case:english_lowercase", {}, "This is an english sentence about it.", False, False),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", 1, 1),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b c", 0, 0),
    ("length_constraints:number_sentences", TWO, "One came. Two left.", True, True),
    ("length_constraints:number_sentences", TWO, "Dr. No came.", False, False),
    ("change_case:capital_word_frequency", CAPITALS, "HELLO there WORLD", True, True),
    ("change_case:capital_word_frequency", CAPITALS, "Hello there WORLD", False, False),
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "The sun and the moon.", True, True),
    ("keywords:existence", {"keywords": ["sun", "moon"], "other": None}, "The sun.", False, False),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "Only sun.", True, True),
    ("detectable_format:title", {}, "<<A title>>\ntext", True, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", True, True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi.\nP.S. bye", True, True),
    ("combination:two_responses", {}, "one **** two", False, False),
    ("combination:two_responses", {}, "one\n******\ntwo", True, True),
    ("startend:quotation", {}, 'Sure!\n"All of it."', False, True),  # loose drops the first line
    ("punctuation:no_comma", {}, " ", False, False),  # an empty response keeps nothing
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a scorer asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(("name", "arguments", "response", "strict", "loose"), CASES)
def test_one_instruction(name, arguments, response, strict, loose):
    verdict = check_instructions("Write.", [name], [arguments], response, key=1)
    assert verdict.strict == [bool(strict)]
    assert verdict.loose == [bool(loose)]


def test_every_instruction_of_the_published_set_is_known():
    """IFEval has 25 kinds of instruction in 9 groups."""
    assert len(known_instructions()) == 25
    assert len({name.partition(":")[0] for name in known_instructions()}) == 9


def test_a_prompt_counts_when_every_instruction_is_kept(tmp_path):
    """The end marker of an engine never reaches the checkers; shares are reported beside."""
    row = {
        "key": 1,
        "question": "Quote it without commas.",
        "instruction_id_list": ["startend:quotation", "punctuation:no_comma"],
        "kwargs": [{}, {"num_words": None}],
    }
    (tmp_path / "IFEval.json").write_text(json.dumps([row]))
    task = get_task("IFEval")
    [loaded] = task.load(tmp_path)
    assert task.prompt(loaded)["messages"] == [{"role": "user", "content": row["question"]}]
    assert task.grade(loaded, '"All of it."').correct
    half = task.grade(loaded, '"All, of it."')
    assert (half.correct, half.scores) == (False, {"loose": 0.0, "instruction": 0.5})


def test_an_unknown_instruction_is_found_when_the_file_is_read(tmp_path):
    """Before a model is loaded, with its row."""
    row = {"key": 1, "question": "Q", "instruction_id_list": ["punctuation:no_comma"]}
    wrong = {**row, "instruction_id_list": ["no:such"]}
    rows = [{**each, "kwargs": [{}]} for each in (row, wrong)]
    (tmp_path / "IFEval.json").write_text(json.dumps(rows))
    with pytest.raises(
        InputError, match=r"IFEval\.json: row 1: instruction 'no:such' is not known"
    ):
        get_task("IFEval").load(tmp_path)


def test_the_instruction_level_figure_is_over_all_instructions(tmp_path):
    """Claim: 1 of 1 and 1 of 3 kept are 2 of 4 instructions, not the mean of the two shares."""
    one, three = ["punctuation:no_comma"], ["punctuation:no_comma", "startend:quotation"]
    three.append("detectable_format:title")
    rows = [
        {"key": 1, "question": "Q", "instruction_id_list": ids, "kwargs": [{}] * len(ids)}
        for ids in (one, three)
    ]
    (tmp_path / "IFEval.json").write_text(json.dumps(rows))
    given = [{"index": i, "responses": ["No comma here."]} for i in range(2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    summary = score(get_task("IFEval"), tmp_path, tmp_path / "p.jsonl", tmp_path / "out").as_dict()
    assert (summary["accuracy"], summary["accuracy_instruction"]) == (0.5, 2 / 4)


def test_a_stand_in_for_the_sentence_splitter_is_flagged(tmp_path):
    """Without NLTK's Punkt data, and only where sentences are counted."""
    verdict = check_instructions(
        "p", ["length_constraints:number_sentences"], [TWO], "A b. C d.", key=1
    )
    other = check_instructions("p", ["punctuation:no_comma"], [{}], "A b.", key=1)
    assert not other.approximate
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        assert verdict.approximate
    else:
        assert not verdict.approximate


def test_a_drawn_letter_is_the_same_every_time():
    """Claim: where the data asks for signs the harness draws a letter: by the row's key, whatever
    Python's random state is, for both readings, and leaving that state as it was."""
    arguments = {"let_relation": "at least", "letter": "#", "let_frequency": 4}

    def verdict(key: int, state: int) -> tuple[bool, bool]:
        random.seed(state)
        before = random.getstate()
        found = check_instructions("p", ["keywords:letter_frequency"], [arguments], TEXT, key=key)
        assert random.getstate() == before
        return found.strict[0], found.loose[0]

    by_key = [{verdict(key, state) for state in range(3)} for key in range(20)]
    assert all(len(found) == 1 for found in by_key)
    assert {strict for found in by_key for strict, _ in found} == {True, False}
