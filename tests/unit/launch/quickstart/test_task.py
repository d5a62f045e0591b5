"""The toy task and its teacher's data: right answers, disjoint splits, honest damage."""

import json
import random

import pytest

from evaluation.tasks import get_task
from launch.quickstart import task, teacher


def test_written_out_addition_by_hand():
    """Carries stand in their column; missing tens are zeros; no leading zeros in the answer."""
    assert task.prompt((57, 68)) == "57+68="
    assert task.response((57, 68)) == "7+8+0=15,5+6+1=12,#125"
    assert task.response((3, 5)) == "3+5+0=8,0+0+0=0,#8"
    assert task.response((9, 91)) == "9+1+0=10,0+9+1=10,#100"
    assert len(task.response((99, 99))) + 1 == task.MAX_RESPONSE_TOKENS


def test_splits_are_a_partition_without_repeats():
    """All 10,000 prompts, each in one split; the test set has at least 500."""
    lists = {split: task.problems(split) for split in task.SPLITS}
    everything = [problem for problems in lists.values() for problem in problems]
    assert len(everything) == len(set(everything)) == (task.LARGEST + 1) ** 2
    prompts = {split: {task.prompt(p) for p in problems} for split, problems in lists.items()}
    assert not prompts["train"] & (prompts["test"] | prompts["validation"])
    assert not prompts["test"] & prompts["validation"]
    assert {split: len(problems) for split, problems in lists.items()} == {
        "train": 8929,
        "validation": 301,
        "test": 770,
    }  # written out: the splits are the same on every machine


def test_the_held_out_file_is_what_the_evaluation_task_reads(tmp_path):
    """Every row of addition.jsonl is graded right against its own response."""
    task.write_data(tmp_path)
    evaluation = get_task("addition")
    rows = evaluation.load(tmp_path)
    assert len(rows) == 770
    assert all(evaluation.grade(row, row["response"]).correct for row in rows)
    training = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert not {row["question"] for row in training} & {row["question"] for row in rows}


def test_tokenizer_gives_one_token_a_character_and_knows_no_mask_token():
    """Text survives a round trip; the template adds nothing; the mask row is no token."""
    tokenizer = teacher.build_tokenizer()
    text = task.prompt((57, 68)) + task.response((57, 68))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "57+68="}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "57+68="
    )
    assert tokenizer.mask_token is None
    assert len(tokenizer) == teacher.MASK_ROW < teacher.VOCAB_SIZE
    ended = [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text


def test_a_character_outside_the_alphabet_is_an_error():
    """A silent gap would change the question."""
    with pytest.raises(Exception, match=r"(?i)unk"):
        teacher.build_tokenizer().encode("2*3=")


def test_undamaged_rows_are_the_plain_sequence():
    """Without damage: input = prompt, response, end; labels the same, without the prompt."""
    tokenizer = teacher.build_tokenizer()
    [(inputs, labels)] = teacher.training_rows([(57, 68)], 0.0, random.Random(0))
    prompt, response = task.prompt((57, 68)), task.response((57, 68))
    assert inputs == [*tokenizer.encode(prompt + response), tokenizer.eos_token_id]
    assert labels == [teacher.IGNORED] * len(prompt) + inputs[len(prompt) :]


def test_damage_touches_inputs_only_and_the_end_token_never_comes_early():
    """Labels of damaged rows are the right response, then end tokens; prompts are never damaged."""
    tokenizer = teacher.build_tokenizer()
    draw = random.Random(1)
    changed = 0
    for problem in task.problems("train")[::300]:
        [(inputs, labels)] = teacher.training_rows([problem], 1.0, draw)
        prompt = tokenizer.encode(task.prompt(problem))
        right = tokenizer.encode(task.response(problem))
        assert inputs[: len(prompt)] == prompt
        assert labels[len(prompt) :][: len(right)] == right
        assert set(labels[len(prompt) + len(right) :]) == {tokenizer.eos_token_id}
        assert tokenizer.eos_token_id not in inputs
        changed += inputs[len(prompt) :][: len(right)] != right
    assert changed > 20
