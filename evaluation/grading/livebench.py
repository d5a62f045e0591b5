"""LiveBench: the official package's scorer of each category and task, release of 2024-11-25.

Scores lie between 0 and 1; the paper counts those above 0.5 as correct. The scorers run in child
processes with hard time limits (see ``scorer_process``), because some start processes of their own
that never end. A scorer that fails on a response scores 0 and says so in a flag; a package that is
missing is reported before anything is graded, and never counts as 0. Programs (the category coding)
run in our sandbox instead, under the same rules as LCB-v6: the package would run them as they are.
"""

import importlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from evaluation.grading import code_lcb as lcb
from evaluation.grading.code_text import last_fence

THRESHOLD = 0.5  # scores above it are correct

_REPOSITORY = "git+https://github.com/LiveBench/LiveBench.git"

_REINSTALL = f"install the package again: pip install --no-deps {_REPOSITORY}"

_MATH = "livebench.process_results.math."
_REASONING = "livebench.process_results.reasoning."
_TABLES = "livebench.process_results.data_analysis."
_WRITING = "livebench.process_results.writing."  # the data calls this category "language"
_INSTRUCTIONS = "livebench.process_results.instruction_following.utils"
_EVALUATOR = "livebench.if_runner.instruction_following_eval.evaluation_main"


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A function of the package and what it is called with."""

    module: str
    function: str
    # Of "gold", "response", "question", "row", "nothing", in order; empty: the function takes the
    # release date and returns the scorer of (gold, response).
    takes: tuple[str, ...] = ("gold", "response")
    seconds: int = 30  # hard limit of one call


_SCORERS = {
    ("math", "AMPS_Hard"): Scorer(
        module=_MATH + "AMPS_Hard.utils", function="amps_hard_process_results", seconds=60
    ),
    ("math", "olympiad"): Scorer(
        module=_MATH + "olympiad.utils", function="proof_rearrangement_process_results"
    ),
    ("reasoning", "zebra_puzzle"): Scorer(
        module=_REASONING + "zebra_puzzle.utils", function="get_zebra_puzzle_evaluator", takes=()
    ),
    ("reasoning", "web_of_lies_v2"): Scorer(
        module=_REASONING + "web_of_lies_v2.utils", function="web_of_lies_process_results"
    ),
    ("reasoning", "spatial"): Scorer(
        module=_REASONING + "spatial.utils", function="spatial_process_results"
    ),
    ("data_analysis", "tablejoin"): Scorer(
        module=_TABLES + "tablejoin.utils",
        function="joinmap_process_results",
        takes=("nothing", "gold", "response"),
    ),
    ("data_analysis", "tablereformat"): Scorer(
        module=_TABLES + "tablereformat.utils",
        function="table_process_results",
        takes=("question", "gold", "response"),
    ),
    ("data_analysis", "cta"): Scorer(module=_TABLES + "cta.utils", function="cta_process_results"),
    ("language", "connections"): Scorer(
        module=_WRITING + "connections.utils",
        function="get_connections_puzzle_evaluator",
        takes=(),
    ),
    ("language", "plot_unscrambling"): Scorer(
        module=_WRITING + "plot_unscrambling.utils", function="plot_unscrambling_process_results"
    ),
    ("language", "typos"): Scorer(
        module=_WRITING + "typos.utils", function="typos_process_results"
    ),
}
_CONTEST = Scorer(
    module=_MATH + "math_competitions.utils",
    function="mathcontest_process_results",
    takes=("gold", "response", "question"),
)
_AIME = Scorer(module=_MATH + "math_competitions.utils", function="aime_process_results")
_OTHER_MATH = Scorer(module=_MATH + "AMPS_Hard.utils", function="amps_hard_process_results")
_FOLLOWING = Scorer(module=_INSTRUCTIONS, function="score_results", takes=("row", "response"))


def scorer_of(row: dict[str, Any]) -> Scorer | None:
    """The package's scorer of a row by its category and task; None where there is none."""
    category, task = row["livebench_category"], row["livebench_task"]
    if (category, task) in _SCORERS:
        return _SCORERS[category, task]
    if (category, task) == ("math", "math_comp"):
        gold = str(row["ground_truth_answer"]).strip().upper()
        return _CONTEST if gold in ("A", "B", "C", "D", "E") else _AIME
    return {"math": _OTHER_MATH, "instruction_following": _FOLLOWING}.get(category)


def missing_for(scorers: set[Scorer]) -> str | None:
    """What these scorers need and this machine lacks, with its remedy; None: nothing."""
    if scorers and find_spec("livebench") is None:
        return (
            "its scorers are in the package livebench, which is not installed; install it with: "
            f"pip install --no-deps {_REPOSITORY}"
        )
    needed = {(scorer.module, scorer.function) for scorer in scorers}
    if _FOLLOWING in scorers:
        needed.add((_EVALUATOR, "test_instruction_following_strict"))
    for module, function in sorted(needed):
        lack = _lack(module, function)
        if lack is not None:
            return f"the scorer {module} {lack}"
    return None


def _lack(module: str, function: str) -> str | None:
    """Why a scorer cannot be used here, with its remedy; None: it can."""
    try:
        found = hasattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        return f"needs the Python module {error.name}, which is not installed; install it with pip"
    except Exception as error:  # it runs the package's code, which may raise anything
        return f"cannot be imported ({type(error).__name__}: {error}); {_REINSTALL}"
    return None if found else f"has no {function}; {_REINSTALL}"


def score_response(row: dict[str, Any], response: str) -> float:
    """The score of one response, between 0 and 1, by the package; raises whatever its scorer does.

    Runs inside a scorer process.
    """
    scorer = scorer_of(row)
    assert scorer is not None
    if scorer is _FOLLOWING:
        return _score_instructions(row, response)
    function = getattr(importlib.import_module(scorer.module), scorer.function)
    gold = row.get("ground_truth_answer")  # programs have tests instead
    gold = str(gold).strip() if scorer in (_CONTEST, _AIME) else gold
    if not scorer.takes:
        return float(function(str(row.get("livebench_release_date") or "")[:10])(gold, response))
    values = {
        "gold": gold,
        "response": response,
        "question": row["question"],
        "row": row,
        "nothing": None,
    }
    return float(function(*(values[name] for name in scorer.takes)))


def _score_instructions(row: dict[str, Any], response: str) -> float:
    """Half for keeping every instruction, half for the share kept. The package's own entry point
    needs a whole table of rows, so its strict evaluator is called for this one.
    """
    evaluator: Any = importlib.import_module(_EVALUATOR)
    scores: Any = importlib.import_module(_INSTRUCTIONS)
    example = evaluator.InputExample(
        key=row.get("key", row.get("question_id", 0)),
        instruction_id_list=row["instruction_id_list"],
        prompt=row["question"],
        kwargs=[
            {key: value for key, value in (each or {}).items() if value is not None}
            for each in row["kwargs"]
        ],
    )
    outcome = evaluator.test_instruction_following_strict(example, {row["question"]: response})
    return float(
        scores.score_results(outcome.follow_all_instructions, outcome.follow_instruction_list)
    )


def program_of(row: dict[str, Any], response: str) -> str:
    """The program of a response to a coding row, with the part that the question gave."""
    program = last_fence(response)
    given = row.get("partial_solution") or ""
    return program if not given or program.startswith(given) else f"{given}\n{program}"


def tests_of(row: dict[str, Any]) -> lcb.Tests:
    """The tests of a coding row, public before private. ValueError: what is wrong with them."""
    original = row.get("original_json") or {}
    if isinstance(original, str):
        original = json.loads(original)
    return lcb.tests_of({"metadata": original.get("metadata"), **row})
