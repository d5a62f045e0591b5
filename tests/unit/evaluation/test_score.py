"""Scoring: grades, means and errors over the predictions that are given."""

import json
import math
import os
import signal

import pytest

from evaluation.generation import verdicts
from evaluation.graded import tell_scorer_errors
from evaluation.grading import mathematics
from evaluation.report import decoding_label, read_summary, table
from evaluation.reporting.summary import Counts, summarize
from evaluation.score import score
from evaluation.tasks import Grade, get_task
from megatron_opdlm.errors import InputError

RIGHT, WRONG = Grade(correct=True, extracted="1"), Grade(correct=False, extracted="2")
SUMMARY_KEYS = [
    "task",
    "n",
    "accuracy",
    "stderr",
    "tokens_per_denoising_step",
    "tokens_per_forward",
    "mean_response_tokens",
    "seconds",
    "settings",
    "k",
    "no_answer_rate",
    "truncation_rate",
]


@pytest.fixture
def data(tmp_path):
    rows = [{"question": f"{a}+1=", "answer": str(a + 1)} for a in range(5)]
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "addition.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def predictions_file(tmp_path, rows):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_accuracy_is_the_mean_over_problems_and_its_error_over_problems():
    """Hand-computed: shares 1, 0.5, 0 have mean 0.5 and standard error 0.5 / sqrt(3)."""
    row = summarize(
        "t",
        [[RIGHT, RIGHT], [RIGHT, WRONG], [WRONG, WRONG]],
        Counts(responses=6, response_tokens=60, passes=30, forwards=40),
        seconds=2.0,
        settings={"mode": "diffusion"},
    )
    assert (row.n, row.accuracy) == (3, 0.5)
    assert row.stderr == pytest.approx(0.5 / math.sqrt(3), abs=1e-12)
    assert row.tokens_per_denoising_step == 2.0
    assert row.tokens_per_forward == 1.5
    assert row.mean_response_tokens == 10.0
    # each response alone gives 2/3 and 1/3: their standard deviation is 1 / (3 sqrt(2))
    assert row.more["std_over_samples"] == pytest.approx(1 / (3 * math.sqrt(2)), abs=1e-12)
    assert [key for key in row.as_dict() if key != "std_over_samples"] == SUMMARY_KEYS


def test_what_was_not_counted_is_none_not_zero():
    """One problem has no standard error; without counts, or without passes, there is no rate."""
    row = summarize("t", [[RIGHT]], None, seconds=0.0, settings={})
    assert (row.stderr, row.tokens_per_denoising_step, row.mean_response_tokens) == (None,) * 3
    assert "std_over_samples" not in row.more
    ar = Counts(responses=1, response_tokens=9, passes=0, forwards=9)
    row = summarize("t", [[RIGHT]], ar, seconds=0.0, settings={})
    assert (row.tokens_per_denoising_step, row.tokens_per_forward) == (None, 1.0)


def test_a_scorer_that_fails_costs_its_response_only(tmp_path, data, monkeypatch, capsys):
    """Claim: whatever is raised, the response is flagged, counted, said and wrong, and all others
    are graded; a bad data row still ends it."""
    addition = get_task("addition")
    real = addition.grade

    def grade(row, response):
        if response == "crash":
            raise RecursionError("too deep")
        return real(row, response)

    monkeypatch.setattr(addition, "grade", grade)
    rows = [{"index": i, "responses": [f"#{i + 1}", "crash", "#0"]} for i in (0, 2, 3)]
    summary = score(addition, data, predictions_file(tmp_path, rows), tmp_path / "out").as_dict()
    assert (summary["n"], summary["accuracy"], summary["scorer_errors"]) == (3, 1 / 3, 3)
    for line in (tmp_path / "out/graded.jsonl").open():
        graded = json.loads(line)
        assert graded["correct"] == [True, False, False]
        assert graded["flags"] == [[], ["scorer_error: RecursionError"], []]
    tell_scorer_errors(summary)
    assert "addition: the scorer failed on 3 responses" in capsys.readouterr().out

    def refuse(row, response):
        raise InputError("a bad row")

    monkeypatch.setattr(addition, "grade", refuse)
    with pytest.raises(InputError, match="a bad row"):
        score(addition, data, predictions_file(tmp_path, rows), tmp_path / "other")


def test_many_mathematical_answers_are_graded_over_the_cores(monkeypatch):
    """Claim: children say what this process says, each response to its own problem."""
    rows = [{"ground_truth_answer": str(i)} for i in range(3)]
    responses = [[rf"\boxed{{{i}}}", "9 apples"] for i in range(3)]
    task = get_task("GSM8K")
    here = task.grade_all(rows, responses)
    asked = []
    real = mathematics.score_all
    monkeypatch.setattr(mathematics, "score_all", lambda *a: asked.append(a[1]) or real(*a))
    monkeypatch.setattr(mathematics, "IN_SERIES", 5)
    assert task.grade_all(rows, responses) == here
    assert asked == [min(os.cpu_count() or 1, 2)]
    assert [grade.correct for row in here for grade in row] == [True, False] * 3
    monkeypatch.setattr(mathematics, "_IN_CHILD", "evaluation.grading.mathematics:no_such")
    [(failed, _), *_] = task.grade_all(rows, responses)
    assert (failed.correct, failed.flags) == (False, ["scorer_error: AttributeError"])


def test_missing_rows_are_left_out_and_control_tokens_never_reach_the_grader(tmp_path, data):
    """Rows 3 and 0 of five: the score is over two problems, in the order of the predictions."""
    rows = [
        {"index": 3, "responses": ["so #4<|im_end|>#5", "#5"]},
        {"index": 0, "responses": ["#1"]},
    ]
    summary = score(get_task("addition"), data, predictions_file(tmp_path, rows), tmp_path / "out")
    assert (summary.n, summary.accuracy) == (2, 0.75)
    graded = [json.loads(line) for line in (tmp_path / "out/graded.jsonl").open()]
    assert graded == [
        {"index": 3, "correct": [True, False], "extracted": ["4", "5"], "flags": [[], []]},
        {"index": 0, "correct": [True], "extracted": ["1"], "flags": [[]]},
    ]
    [written] = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(written) == SUMMARY_KEYS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "graded.jsonl",
        "summary.json",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": 5, "responses": ["x"]}], "'index' is 5; the data file has rows 0 to 4"),
        ([{"index": "0", "responses": ["x"]}], "'index' is '0'"),
        ([{"index": True, "responses": ["x"]}], "'index' is True"),
        ([{"index": 0, "responses": []}], "'responses' must be"),
        ([{"index": 0, "responses": "x"}], "'responses' must be"),
        ([{"index": 0, "responses": ["x"]}] * 2, "index 0 for the second time"),
        ([{"index": 0, "responses": ["x"], "task": "exact_match"}], "no rows of task addition"),
        ([], "holds no rows"),
    ],
)
def test_bad_predictions_are_one_line_and_leave_nothing_behind(tmp_path, data, rows, message):
    """Value, rule, remedy; no output directory is made."""
    with pytest.raises(InputError, match=message) as caught:
        score(get_task("addition"), data, predictions_file(tmp_path, rows), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_directory_with_something_in_it_is_refused(tmp_path, data):
    """Results are never mixed with others; an empty directory is fine."""
    rows = predictions_file(tmp_path, [{"index": 0, "responses": ["#1"]}])
    out = tmp_path / "out"
    out.mkdir()
    score(get_task("addition"), data, rows, out)
    with pytest.raises(InputError, match="exists and is not empty"):
        score(get_task("addition"), data, rows, out)


def test_a_killed_scoring_goes_on_where_it_was(tmp_path, data, monkeypatch, capfd):
    """Claim: after a real SIGKILL, and a torn line, the same command grades what was not graded
    alone, publishes what an undisturbed one does, and says how far it is; until then there is no
    published file, and other predictions are refused by name."""
    monkeypatch.setattr(verdicts, "FIRST_PART", 2)
    monkeypatch.setattr(verdicts, "PART_SECONDS", 0.0)
    task, out = get_task("addition"), tmp_path / "out"
    rows = [{"index": i, "responses": [f"#{i + 1}", "#0"]} for i in range(5)]
    predictions = predictions_file(tmp_path, rows)
    whole = score(task, data, predictions, tmp_path / "whole").as_dict()
    asked, real = [], task.grade

    def grade(row, response):
        asked.append(row["question"])
        if len(asked) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(row, response)

    monkeypatch.setattr(task, "grade", grade)
    child = os.fork()
    if child == 0:
        try:
            score(task, data, predictions, out)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == ["graded.partial.jsonl", "settings.json"]
    with (out / "graded.partial.jsonl").open("a") as file:
        file.write('{"index": 2, "gra')
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="differs in predictions;"):
        score(task, data, others, out)
    monkeypatch.setattr("megatron_opdlm.reporting.progress.LINE_SECONDS", 0.0)
    capfd.readouterr()
    assert {**score(task, data, predictions, out, show=True).as_dict(), "seconds": 0} == {
        **whole,
        "seconds": 0,
    }
    assert asked == ["2+1=", "2+1=", "3+1=", "3+1=", "4+1=", "4+1="]
    said = capfd.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in said] == [
        "graded: 8 of 10 responses",
        "graded: 10 of 10 responses",
    ]
    assert sorted(path.name for path in out.iterdir()) == ["graded.jsonl", "summary.json"]
    graded = "graded.jsonl"
    assert (out / graded).read_bytes() == (tmp_path / "whole" / graded).read_bytes()


def test_table_shows_every_row_and_a_dash_for_what_was_not_measured(tmp_path, data):
    """The printed table is made from the summary alone."""
    rows = predictions_file(tmp_path, [{"index": 0, "responses": ["#1"]}])
    score(get_task("addition"), data, rows, tmp_path / "out")
    lines = table(read_summary(tmp_path / "out/summary.json")).splitlines()
    assert lines[0].split() == (
        ["task", "decoding", "n", "accuracy", "stderr", "tok/step", "tok/forward", "tokens", "s"]
    )
    assert lines[1].split()[:4] == ["addition", "1", "1.0000", "-"]


def test_decoding_labels():
    """Each way of decoding has a short name for tables and plots."""
    settings = {"mode": "diffusion", "threshold": 0.9, "entropy_bound": 0.35, "denoising_steps": 2}
    assert decoding_label({"mode": "ar"}) == "ar"
    assert decoding_label({**settings, "remasking": "low_confidence_static"}) == "static T=2"
    assert decoding_label({**settings, "remasking": "low_confidence_dynamic"}) == "dynamic 0.9"
    assert decoding_label({**settings, "remasking": "entropy_bounded"}) == "entropy 0.35"


def test_a_file_that_is_no_summary_is_refused(tmp_path):
    """Another JSON file is an input error, not a traceback."""
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a list of summary rows"):
        read_summary(tmp_path / "x.json")
