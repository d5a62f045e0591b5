"""LiveBench: a package of the same layout stands in for the one that users install."""

import json
import sys

import pytest

from evaluation.tasks import get_task
from megatron_opdlm.errors import RunError
from tests.unit.evaluation.tasks.test_benchmarks import FIXTURES, PRODUCT, SUM, graded

SCORERS = {
    "math/AMPS_Hard": "def amps_hard_process_results(gold, answer): return gold in answer",
    "math/math_competitions": (
        "def mathcontest_process_results(gold, answer, question):\n"
        "    assert question == 'Which letter?'\n    return gold * 4 in answer\n"
        "def aime_process_results(gold, answer): return answer.endswith(gold)\n"
    ),
    "math/olympiad": (
        "import time\ndef proof_rearrangement_process_results(gold, answer):\n"
        "    return 0.5 if 'half' in answer else 0.51"
    ),
    "reasoning/zebra_puzzle": (
        "def get_zebra_puzzle_evaluator(release):\n    assert release == '2024-11-25'\n"
        "    return lambda gold, answer: gold in answer"
    ),
    "reasoning/web_of_lies_v2": "def web_of_lies_process_results(g, answer): return g in answer",
    "reasoning/spatial": "def spatial_process_results(gold, answer): return gold in answer",
    "data_analysis/tablejoin": "def joinmap_process_results(_, g, answer): return g in answer",
    "data_analysis/tablereformat": (
        "def table_process_results(command, gold, answer):\n"
        "    assert command.startswith('Please convert')\n    return gold in answer"
    ),
    "data_analysis/cta": "def cta_process_results(gold, answer): return answer.endswith(gold)",
    "writing/connections": (
        "def get_connections_puzzle_evaluator(release): return lambda gold, answer: gold in answer"
    ),
    "writing/plot_unscrambling": (
        "def plot_unscrambling_process_results(gold, answer): return gold in answer"
    ),
    "writing/typos": (
        "def typos_process_results(gold, answer):\n    print('chatter')\n"
        "    if answer == 'crash': raise ValueError\n    if answer == 'exit':\n"
        "        import os; os._exit(0)\n    return gold in answer"
    ),
    "instruction_following": (
        "def score_results(every, each): return (every + sum(each) / len(each)) / 2"
    ),
}
EVALUATOR = """
from dataclasses import dataclass
@dataclass
class InputExample:
    key: object
    instruction_id_list: list
    prompt: str
    kwargs: list
@dataclass
class Outcome:
    follow_all_instructions: bool
    follow_instruction_list: list
def test_instruction_following_strict(example, answers):
    assert example.kwargs == [{}]
    kept = ',' not in answers[example.prompt]
    return Outcome(kept, [kept])
"""
AMPS = "process_results/math/AMPS_Hard/utils.py"
FOLLOWING = "if_runner/instruction_following_eval/evaluation_main.py"
# A right and a wrong response to every row of the fixture, in its order.
LIVEBENCH = [
    *(["it is 5", "it is 6"], ["BBBB", "AAAA"], ["it is 025", "025 it is"], ["1", "half"]),
    *(["tea", "milk"], ["yes, no, yes", "no"], ["7", "8"], ['{"a": "b"}', "{"], ["{}", "["]),
    *(["the city<|im_end|>", "town"], ["a, b", "c"], ["First. Second.", "Second."]),
    *(["right", "wrong"], ["No comma.", "A, comma."], [SUM, PRODUCT]),
]


@pytest.fixture
def livebench(tmp_path, monkeypatch):
    """A package ``livebench`` with the official one's modules and signatures."""
    root = tmp_path / "site/livebench"
    sources = {f"process_results/{name}/utils.py": text for name, text in SCORERS.items()}
    sources["if_runner/instruction_following_eval/evaluation_main.py"] = EVALUATOR
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(root.parent))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "livebench"]:
        del sys.modules[name]


def test_livebench_calls_the_official_scorers_as_they_want_to_be(tmp_path, livebench):
    """Every category and task; a score of exactly 0.5 is not correct. Programs need no package."""
    summary, rows = graded(tmp_path, "LiveBench", LIVEBENCH)
    assert [row["correct"] for row in rows] == [[True, False]] * len(LIVEBENCH)
    assert rows[3]["scores"] == [{"score": 0.51}, {"score": 0.5}]
    assert summary["divisions"]["math"]["n"] == 4
    assert summary["divisions"]["math"]["accuracy_score"] == pytest.approx((3.51 + 0.5) / 8)
    assert set(summary["divisions"]) == {
        *("math", "reasoning", "data_analysis", "language", "instruction_following", "coding")
    }


def test_a_scorer_that_fails_says_so_and_costs_one_response(tmp_path, livebench):
    """A crash and a vanished process are wrong and flagged; the next response is scored."""
    (tmp_path / "LiveBench.json").write_text(
        json.dumps(
            [
                row
                for row in json.loads((FIXTURES / "LiveBench.json").read_text())
                if row["livebench_task"] == "typos"
            ]
        )
    )
    _, [row] = graded(tmp_path, "LiveBench", [["crash", "exit", "right"]], data=tmp_path)
    assert row["correct"] == [False, False, True]
    assert row["flags"] == [["scorer_error: ValueError"], ["scorer_error: died"], []]


def test_a_scorer_that_never_ends_is_killed(tmp_path, livebench, monkeypatch):
    """The hard limit: its whole process group goes, children and all."""
    from evaluation.grading.scorer_process import Job, score_all

    utils = livebench / "process_results/reasoning/spatial/utils.py"
    utils.write_text(
        "import subprocess\ndef spatial_process_results(gold, answer):\n"
        "    subprocess.run(['sleep', '600']) if answer == 'sleep' else None\n    return 1"
    )
    rows = json.loads((FIXTURES / "LiveBench.json").read_text())
    [row] = [row for row in rows if row["livebench_task"] == "spatial"]
    scorer = "evaluation.grading.livebench:score_response"
    jobs = [
        Job(row=row, response="sleep", seconds=2, scorer=scorer),
        Job(row=row, response="7", seconds=60, scorer=scorer),
    ]
    outcomes = score_all(jobs, 1)
    assert [(outcome.score, outcome.error) for outcome in outcomes] == [
        (0.0, "timeout"),
        (1.0, None),
    ]


def test_without_the_package_livebench_is_not_graded_at_all(tmp_path):
    """Never a zero: the error says what to install, and nothing is written."""
    with pytest.raises(
        RunError, match=r"task LiveBench: .*livebench, which is not installed; insta"
    ):
        graded(tmp_path, "LiveBench", LIVEBENCH)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        (AMPS, "import no_such_module_x", "needs the Python module no_such_module_x"),
        (AMPS, "1 / 0", r"AMPS_Hard.utils cannot be imported \(ZeroDivisionError: .*; install"),
        (AMPS, "", "has no amps_hard_process_results; install the package again"),
        (FOLLOWING, "import no_such_module_x", "needs the Python module no_such_module_x"),
    ],
)
def test_a_package_that_is_installed_by_half_is_no_zero(tmp_path, livebench, module, text, message):
    """What is wrong with it is named before anything is graded."""
    (livebench / module).write_text(text)
    with pytest.raises(RunError, match=message):
        graded(tmp_path, "LiveBench", LIVEBENCH)


def test_degenerate_responses_get_through_the_children(tmp_path, livebench):
    """Claim: 20,000 characters of any kind reach a scorer and come back as its verdict."""
    task = get_task("LiveBench")
    [row] = [row for row in task.load(FIXTURES) if row["livebench_task"] == "typos"]
    texts = [kind * (20_000 // len(kind)) for kind in ("\n", ".", "(", "A ", "answer ", '"', "```")]
    [grades] = task.grade_all([row], [texts])
    assert not any(flag for grade in grades for flag in grade.flags if flag != "no_answer")
