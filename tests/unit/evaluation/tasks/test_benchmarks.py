"""Every registered benchmark, end to end through evaluation.score, on rows like the published."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.score import score
from evaluation.tasks import get_task, task_names
from evaluation.tasks.task import plain_name
from megatron_opdlm.errors import InputError

FIXTURES = Path(__file__).parents[3] / "fixtures/evaluation"
PAPER = (
    *("MMLU", "MMLU-Pro", "GPQA-Diamond", "IFEval", "CEval", "LiveBench", "GSM8K", "MATH-500"),
    *("AIME-24", "AIME-25", "LMB-Hard", "ZebraLogic", "HumanEval", "MBPP", "LCB-v6", "Codeforces"),
    *("MMMLU-lite", "INCLUDE-lite", "MT-AIME2024", "MLogiQA"),
)
FILES = (
    *("MMLU", "MMLU_Pro", "GPQA_Diamond_shuffled", "IFEval", "CEval", "LiveBench", "GSM8K"),
    *("MATH500", "AIME2024", "AIME2025", "LiveMathBench_Hard", "ZebraLogic", "HumanEval", "MBPP"),
    *("LCB_v6", "Codeforces", "MMMLU_Lite", "INCLUDE_Lite", "MT_AIME2024", "MLogiQA"),
)
LETTERS = [['"answer": "C"', "Answer: D"], ["so \\boxed{B}", "no idea"]]
NUMBERS = [["<think>13?</think>\\boxed{12}", "\\boxed{13}<|im_end|>"], ["\\boxed{3/4}", "none"]]
GRID = json.dumps(
    {
        "solution": {
            "House 1": {"name": "Eric", "drink": "Tea"},
            "2": {"Name": "Bob", "Drink": "milk"},
        }
    }
)
ADD = "def add(a, b):\n    return a + b\n"
SUBTRACT = "def add(a, b):\n    return a - b\n"
SUM = "```python\nprint(sum(map(int, input().split())))\n```"
PRODUCT = "```python\na, b = map(int, input().split())\nprint(a * b)\n```"

# For every row a right and a wrong response.
RESPONSES = {
    **dict.fromkeys(("MMLU", "MMLU-Pro", "GPQA-Diamond"), LETTERS),
    **dict.fromkeys(("CEval", "MMMLU-lite", "INCLUDE-lite", "MLogiQA"), LETTERS),
    **dict.fromkeys(("GSM8K", "MATH-500", "AIME-24", "AIME-25", "LMB-Hard"), NUMBERS),
    **dict.fromkeys(("MT-AIME2024", "MATH_train_traceRL", "DAPO_Math_17k", "GSM8K_train"), NUMBERS),
    "IFEval": [["Hello you.<|im_end|>", "Hello, you."], ['"Two words."<|im_end|>', "Two words."]],
    "ZebraLogic": [[GRID, "{}"], [f"```json\n{GRID}\n```", GRID.replace("Bob", "Eric")]],
    "HumanEval": [[ADD + "```", SUBTRACT + "```"]],
    "MBPP": [[ADD + "```", SUBTRACT + "```"]],
    "LCB-v6": [[SUM, PRODUCT]],
    "Codeforces": [[SUM, PRODUCT]],
    "opdlm_train": [
        ["\\boxed{42}", "\\boxed{41}"],
        ['"answer": "B"', '"answer": "A"'],
        [f"```python\n{ADD}```", f"```python\n{SUBTRACT}```"],
        ["Fine.", "Not fine."],
    ],
}


CODING = {
    "question": "q",
    "livebench_category": "coding",
    "livebench_task": "LCB_generation",
    "public_test_cases": "[]",
    "private_test_cases": "[]",
}


def graded(tmp_path, name, responses, data=FIXTURES, **more):
    """The summary row and the graded rows of these responses."""
    rows = [{"index": i, "responses": texts, **more} for i, texts in enumerate(responses)]
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    score(get_task(name), data, predictions, out)
    [summary] = json.loads((out / "summary.json").read_text())
    return summary, [json.loads(line) for line in (out / "graded.jsonl").open()]


def test_names_of_the_paper_and_of_the_files_mean_the_same():
    """All twenty, whatever the case and punctuation; the files' names are the published ones."""
    assert tuple(get_task(name).file for name in PAPER) == tuple(f"{n}.json" for n in FILES)
    for paper, file in zip(PAPER, FILES, strict=True):
        for name in (paper, file, file.lower(), paper.replace("-", "_")):
            assert get_task(name).name == paper
    plain = [plain_name(name) for name in task_names()]
    assert len(set(plain)) == len(plain)
    assert set(RESPONSES) | {"LiveBench", "addition", "exact_match", "exact_match:NAME"} == set(
        task_names()
    )
    with pytest.raises(InputError, match="did you mean 'MATH-500'"):
        get_task("MATH-50")


@pytest.mark.parametrize("name", RESPONSES)
def test_every_benchmark_grades_right_and_wrong(tmp_path, name):
    """One right and one wrong response a row: half are correct, each where it should be."""
    summary, rows = graded(tmp_path, name, RESPONSES[name])
    scored = [row for row in rows if row["flags"] != [["not_scored"], ["not_scored"]]]
    assert [row["correct"] for row in scored] == [[True, False]] * len(scored)
    assert (summary["n"], summary["accuracy"], summary["k"]) == (len(scored), 0.5, 2)
    assert summary["task"] == get_task(name).name
    assert summary["truncation_rate"] is None
    assert ("pass_at_k" in summary) == get_task(name).samples_pass_at_k
    if "pass_at_k" in summary:
        assert summary["pass_at_k"] == {"1": 0.5, "2": 1.0}


def test_what_is_asked_is_byte_for_byte_the_papers():
    """Options are rewritten over the whole question; only the last key of LMB's chooses Chinese."""

    def asked(name):
        task = get_task(name)
        return [task.prompt(row) for row in task.load(FIXTURES)]

    choice = (
        "\nPlease show your choice in the answer field with only the choice letter, e.g., "
        '"answer": "C".'
    )
    assert asked("MMLU")[0]["messages"] == [
        {
            "role": "user",
            "content": "Which colour has clear sky A. by day?\nA. red\nB. green\nC. blue\nD. grey"
            + choice,
        }
    ]
    assert asked("CEval")[0]["messages"][0]["content"] == (
        "Which colour has clear sky (A) by day?\nA. red\nB. green\nC. blue\nD. grey" + choice
    )
    question = "Tom has 3 bags of {4} apples. How many apples?"
    assert asked("GSM8K")[0]["messages"][0]["content"] == (
        question + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    english, chinese = (prompt["messages"][0]["content"] for prompt in asked("LMB-Hard"))
    assert english == (
        "Here is a math question, please reasoning step by step, and put your answer in \\boxed{}."
        f"\n{question}\n"
    )
    assert chinese == (
        "下面是一个数学问题，请逐步推理，并把最终答案放置于\\boxed{}中。\nWhat is 1/2 + 1/4?\n"  # noqa: RUF001
    )
    for name in ("IFEval", "LiveBench", "ZebraLogic"):
        for row, prompt in zip(get_task(name).load(FIXTURES), asked(name), strict=True):
            assert prompt == {"messages": [{"role": "user", "content": row["question"]}]}


def test_truncated_and_unfinished_responses_are_flagged(tmp_path):
    """A truncated right answer counts, as in the paper's accuracy, and is flagged; thinking that
    never ends is no answer. The strict accuracy asks for a box or an announcement.
    """
    responses = [["\\boxed{12} and", "<think>\\boxed{12}"], ["so 0.75", "so 0.5"]]
    summary, rows = graded(tmp_path, "GSM8K", responses, finish_reason=["length", "stop"])
    assert rows[0]["correct"] == [True, False]
    assert rows[0]["flags"] == [["truncated"], ["no_answer", "unfinished_thinking"]]
    assert rows[0]["extracted"] == ["12", None]
    assert rows[1]["correct"] == [True, False]
    assert rows[1]["strict"] == [False, False]
    assert (summary["accuracy"], summary["accuracy_strict"]) == (0.5, 0.25)
    assert (summary["truncation_rate"], summary["no_answer_rate"]) == (0.5, 0.25)


def test_languages_are_reported_apart(tmp_path):
    """Each subdivision has its own count, accuracy and error."""
    summary, _ = graded(tmp_path, "MMMLU-lite", [["Answer: C"], ["Answer: C"]])
    assert summary["divisions"] == {
        "mmmlu_de": {"n": 1, "accuracy": 1.0, "stderr": None},
        "mmmlu_sw": {"n": 1, "accuracy": 0.0, "stderr": None},
    }


def test_missing_data_names_the_file_and_the_command(tmp_path):
    """The one line says which file is wanted, and which command fetches it."""
    with pytest.raises(InputError, match=r"MATH500\.json.*evaluation\.download.*--tasks MATH-500"):
        get_task("MATH500").load(tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("GSM8K", [{"question": "q", "ground_truth_answer": None}], "row 0: needs 'ground_truth_"),
        ("GSM8K", [{"ground_truth_answer": "1"}], "row 0: needs the text 'question'"),
        ("GSM8K", {"question": "q"}, "a dict; give a list of objects"),
        ("GSM8K", ["q"], "row 0: a str, an object is needed"),
        ("GSM8K", [], "holds no rows"),
        ("MMLU", [{"question": "q", "ground_truth_answer": "AB"}], "one letter"),
        ("IFEval", [{"question": "q", "instruction_id_list": ["a"], "kwargs": []}], "'kwargs'"),
        ("ZebraLogic", [{"question": "q", "ground_truth_answer": "{"}], "header and rows"),
        ("ZebraLogic", [{"question": "q", "ground_truth_answer": "1" * 5000}], "header and rows"),
        ("LiveBench", [{"question": "q", "livebench_category": "x"}], "livebench_task"),
        ("LiveBench", [CODING | {"original_json": "[1]"}], "its tests cannot be read"),
        ("LiveBench", [CODING | {"public_test_cases": "[1]"}], "its tests cannot be read"),
    ],
)
def test_rows_of_another_schema_are_named(tmp_path, name, rows, message):
    """A wrong file is found when it is read, before anything is generated."""
    (tmp_path / get_task(name).file).write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        get_task(name).load(tmp_path)


def test_the_command_grades_a_published_file(tmp_path):
    """As users call it, with the data file's name."""
    (tmp_path / "p.jsonl").write_text('{"index": 1, "responses": ["Answer: B", "B"]}\n')
    command = [
        *(sys.executable, "-m", "evaluation.score", "--task", "gpqa_diamond_shuffled"),
        *("--data", str(FIXTURES), "--predictions", str(tmp_path / "p.jsonl")),
        *("--out", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "GPQA-Diamond" in done.stdout
    [row] = [json.loads(line) for line in (tmp_path / "out/graded.jsonl").open()]
    assert row == {
        "index": 1,
        "correct": [True, True],
        "extracted": ["B", "B"],
        "flags": [[], []],
        "strict": [True, True],
    }
