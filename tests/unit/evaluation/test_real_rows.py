"""Real benchmark rows, with verdicts of others: the whole files where a developer has them
(``../shared/data`` beside the checkout), else the few in tests/fixtures/real.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.download import convert
from evaluation.grading.instructions import check_instructions
from evaluation.grading.mathematics import grade_math
from evaluation.run import prompts_of
from evaluation.tasks import get_task
from evaluation.tasks.evalplus import EvalPlusTask
from megatron_opdlm.model_files.vocabulary import load_tokenizer

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
WHOLE = SHARED / "benchmarks"
ROWS = WHOLE if WHOLE.is_dir() else ROOT / "tests" / "fixtures" / "real"
TOKENIZER = SHARED / "qwen3-tokenizer"
whole_only = pytest.mark.skipif(not WHOLE.is_dir(), reason="needs ../shared/data/benchmarks")
qwen3_only = pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs ../shared/data/qwen3-*")

# How models write an answer; all are right by the paper's rule and by the strict one.
STYLES = (
    "so \\boxed{%s}.",
    "The final answer is: $\\boxed{%s}$",
    "The final answer is $%s$.",
    "Thus, the answer is $%s$.",
    "**Answer:** $%s$",
    "$$\\fbox{%s}$$",
)


def read(name: str) -> list[dict[str, Any]]:
    data = (ROWS / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    return json.loads(text) if name.endswith(".json") else [*map(json.loads, text.splitlines())]


def every(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """About ``most`` of many rows, spread over all of them."""
    return rows[:: max(1, len(rows) // most)]


def canonical_verdicts(task: EvalPlusTask, solutions: list[dict[str, Any]]) -> list[bool]:
    """The verdicts on the authors' own solutions, completed as a model would."""
    form = [row | {"question": row["prompt"]} for row in solutions]
    texts = [[row["prompt"] + row["canonical_solution"] + "\n```"] for row in solutions]
    return [grade.correct for [grade] in task.grade_all(form, texts)]


@pytest.mark.parametrize(
    "most", [6, pytest.param(164, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_canonical_programs_pass_their_own_tests(most: int):
    """Claim: OpenAI's solutions pass the tests that OpenAI's rows carry."""
    solutions = every(read("HumanEval.jsonl.gz"), most)
    task = get_task("HumanEval")
    assert isinstance(task, EvalPlusTask) and not task.problems
    assert all(canonical_verdicts(task, solutions))


@whole_only
@pytest.mark.parametrize(
    "most", [4, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
@pytest.mark.parametrize("name", ["HumanEval", "MBPP"])
def test_canonical_programs_pass_evalplus_tests(name: str, most: int):
    """Claim: EvalPlus' solutions pass EvalPlus' base tests, in the published files' order, but for
    one whose generator EvalPlus' own extraction drops: it keeps no function without ``return``.
    """
    task = get_task(name)
    assert isinstance(task, EvalPlusTask)
    rows = every(task.load(WHOLE), most)
    problems = [problem for problem in map(task.problem, rows) if problem is not None]
    texts = [[f"{one['prompt']}{one['canonical_solution']}\n```"] for one in problems]
    grades = [grade for [grade] in task.grade_all(rows, texts)]
    wrong = {
        one["task_id"] for one, grade in zip(problems, grades, strict=True) if not grade.correct
    }
    assert wrong <= {"Mbpp/630"}


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("GSM8K", 60),
        pytest.param("GSM8K", 2000, marks=pytest.mark.slow),
        pytest.param("MATH500", 60, marks=whole_only),
        pytest.param("MATH500", 500, marks=[whole_only, pytest.mark.slow]),
    ],
)
def test_gold_answers_are_right_in_every_style(name: str, most: int):
    for row in every(read(f"{name}.json"), most):
        gold = row["ground_truth_answer"]
        verdicts = {style: grade_math(style % gold, gold) for style in STYLES}
        wrong = [style for style, verdict in verdicts.items() if not verdict.strict]
        assert not wrong, (gold, wrong)
        assert grade_math(f"so it is **{gold}**", gold).strict or not gold.isdigit()


def test_verdicts_on_solutions_are_openais():
    """Claim: of solutions that OpenAI's models wrote, those count that OpenAI labelled right."""
    rows = read("GSM8K.json")
    for line in read("gsm8k_model_solutions_labelled.jsonl"):
        gold = rows[line["index"]]["ground_truth_answer"]
        found = [grade_math(response, gold).correct for response in line["responses"]]
        assert found == line["expected"], line


@whole_only
def test_verdicts_on_responses_to_math_are_qwens():
    for line in read("math_qwen25_responses_labelled.jsonl"):
        verdicts = [grade_math(response, line["gold"]) for response in line["responses"]]
        assert [v.correct for v in verdicts] == line["expected"]
        assert [v.strict for v in verdicts] == line["expected"]


def test_verdicts_on_instructions_are_googles():
    """Claim: strict and loose, instruction by instruction, on the published responses of GPT-4; but
    for rows whose letter is a sign, where Google's checker drew another one, and for sentences that
    the untrained splitter counts."""
    rows, differing = read("IFEval.json"), 0
    for line in read("ifeval_gpt4_responses_with_google_verdicts.jsonl"):
        row = rows[line["index"]]
        names, arguments = row["instruction_id_list"], row["kwargs"]
        verdict = check_instructions(
            row["question"], names, arguments, line["responses"][0], key=row["key"]
        )
        drawn = any(a.get("letter") in ("#", "!") for a in arguments)
        expected = line["expected_strict"], line["expected_loose"]
        if (verdict.strict, verdict.loose) != expected:
            differing += 1
            assert drawn or verdict.approximate, row["key"]
    assert differing <= 2


def test_public_files_become_the_published_ones(tmp_path: Path):
    """Claim: what is converted is what the published file has, row by row."""
    if ROWS == WHOLE:
        (tmp_path / "MbppPlus.jsonl.gz").write_bytes((WHOLE / "MbppPlus.jsonl.gz").read_bytes())
        (tmp_path / "HumanEvalPlus.jsonl.gz").write_bytes(
            (WHOLE / "HumanEvalPlus.jsonl.gz").read_bytes()
        )
        for name, public in (("HumanEval", "HumanEval.jsonl.gz"), ("MBPP", "sanitized-mbpp.json")):
            convert(get_task(name), WHOLE / public, tmp_path)
            made = json.loads((tmp_path / f"{name}.json").read_text())
            published = read(f"{name}.json")
            keys = ("task_id", "question")
            assert [[row[k] for k in keys] for row in made] == [
                [row[k] for k in keys] for row in published
            ]
    else:
        convert(get_task("HumanEval"), ROWS / "HumanEval.jsonl.gz", tmp_path)
    assert get_task("HumanEval").load(tmp_path)[0]["task_id"] == "HumanEval/0"


@pytest.fixture(scope="module")
def qwen3() -> Any:
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None
    return tokenizer


PLAIN = "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
THINKING = "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
BOXED = "%s\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE = (
    "%s\nPlease show your choice in the answer field with only the choice letter, e.g., "
    '"answer": "C".'
)
PROGRAM = (
    "Please provide a self-contained Python script that solves the following problem in a "
    "markdown code block:\n```\n%s\n```\n"
)
PREFILL = (
    "Below is a Python script with a self-contained function that solves the problem and passes "
    "corresponding tests:\n```python\n"
)


@qwen3_only
@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_are_the_papers_token_for_token(qwen3: Any, thinking: bool):
    """Claim: the ids that a model gets are those of the paper's text, written out here, by the
    tokenizer's own library; code never thinks and goes on inside the assistant's turn."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    turn = THINKING if thinking else PLAIN
    mmlu = [row["question"] for row in read("MMLU_stem200.json")]
    for letter in "ABCDEFGHIJ":  # blanks after it go, too, and so does the end of a line
        mmlu = [f"{letter}. ".join(re.split(rf"\({letter}\)\s*", text)) for text in mmlu]
    humaneval = [row | {"question": row["prompt"]} for row in read("HumanEval.jsonl.gz")]
    cases = [
        ("GSM8K", read("GSM8K.json"), lambda row: turn % (BOXED % row["question"])),
        ("IFEval", read("IFEval.json"), lambda row: turn % row["question"]),
        ("HumanEval", humaneval, lambda row: PLAIN % (PROGRAM % row["question"].strip()) + PREFILL),
    ]
    for name, rows, text in cases:
        chosen = every(rows, 20)
        made = prompts_of(get_task(name), chosen, qwen3, enable_thinking=thinking)
        expected = [plain.encode(text(row), add_special_tokens=False).ids for row in chosen]
        assert [prompt.ids for prompt in made] == expected, name
    made = prompts_of(get_task("MMLU"), read("MMLU_stem200.json"), qwen3, enable_thinking=thinking)
    asked = [plain.encode(turn % (CHOICE % text), add_special_tokens=False).ids for text in mmlu]
    assert [prompt.ids for prompt in made] == asked


@qwen3_only
def test_the_mask_token_is_the_first_free_id(qwen3: Any):
    assert max(qwen3.get_vocab().values()) + 1 == len(qwen3) == 151669
    assert qwen3.convert_tokens_to_ids("<|im_end|>") == 151645
