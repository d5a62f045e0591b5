"""Claims about the code benchmarks: what of a response is run, and which programs are right."""

import base64
import gzip
import json
import pickle
import random
import zlib
from typing import cast

import pytest

import evaluation.jail.sandbox
from evaluation.grading import code_evalplus, code_expected, code_lcb, code_probe, code_sanitizer
from evaluation.grading.code_evalplus import HUMANEVAL, Oracle, find_problems
from evaluation.grading.code_outputs import same_lines, same_value, same_words
from evaluation.grading.code_sanitizer import longest_python, sanitized
from evaluation.grading.code_text import called_function, fenced_python, last_fence
from evaluation.jail.sandbox import Jail, JailLost, Outcome, Sandbox
from evaluation.tasks.codeforces import Codeforces
from evaluation.tasks.evalplus import own_tests
from evaluation.tasks.humaneval import HumanEval
from evaluation.tasks.livecodebench import LiveCodeBench
from evaluation.tasks.mbpp import MBPP
from evaluation.tasks.programs import grade_programs
from evaluation.tasks.training_probes import OPDLMTrain
from megatron_opdlm.errors import InputError, RunError

PY = "```python\n"
END = "\n```"


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox()


FENCES = [
    # response, LiveCodeBench's (last two fence lines), the domain extractor's (Python fences)
    ("", "", ""),
    ("print(1)", "", ""),
    (f"{PY}a{END}", "a", "a"),
    (f"text {PY}a{END}", "a", "a"),  # a fence may open after other text
    ("```python\na```", "", "a"),  # and close at the end of a line of code
    (f"text {PY}a\nb```\nthen\n{PY}c\n``` end", "c", "a\nb\n\nc"),
    (f"in ```python ```, so\n{PY}a{END}", "a", "a"),  # a fence that is only spoken of
    (f"use ```python a``` so\n{PY}b{END}", "b", "b"),
    ("so ```python a``` it is", "", "a"),
    (f"a```\nthen\n{PY}b{END}", "b", "b"),  # a stray closing fence opens nothing
    (f"{PY}a = '```'\nb{END}", "b", "a = '```'\nb"),
    (f"{PY}a{END} done", "a", "a"),
    (f"{PY}a", "", ""),  # cut off
    (f"```\na{END}", "a", "a"),
    (f"```Python\na{END}", "a", "a"),
    (f"```py\na{END}", "a", "a"),
    (f"```python3\na{END}", "a", "a"),
    (f"```cpp\na{END}", "a", "a"),  # any fence where none says Python
    (f"```cpp\na{END}\n{PY}b{END}", "b", "b"),
    (f"{PY}a{END}\n```cpp\nb{END}", "b", "a"),
    (f"{PY}a{END}\nthen\n{PY}b{END}", "b", "a\n\nb"),
    (f"{PY}a{END}\n{PY}b", "", "a"),  # the last two fence lines are the end of one and a start
    (f"{PY}a{END}\noutput:\n```\n5{END}", "5", "a"),
    (f"  {PY}a\n  ```", "a", "a"),
    (f"{PY}a\n\nb{END}", "a\n\nb", "a\n\nb"),
    (f"{PY}{END}", "", ""),
    ("```python\n```", "", ""),
    (f"{PY}s = '``'{END}", "s = '``'", "s = '``'"),
    ("``` python\na\n```", "a", "a"),
    ("```python title=x\na\n```", "a", "a"),
    ("one `tick` and ``two``", "", ""),
    ("```\na\n```\n```\nb\n```", "b", "a\n\nb"),
]


@pytest.mark.parametrize(("response", "lcb", "domain"), FENCES)
def test_programs_are_taken_out_of_fences(response, lcb, domain):
    assert last_fence(response).rstrip() == lcb
    assert fenced_python(response).strip() == domain


def test_the_block_that_defines_the_function_wins():
    text = f"{PY}def f(): return 1{END}\n{PY}f()\nexit(){END}\n{PY}def g(): pass{END}"
    assert fenced_python(text, "f") == "def f(): return 1"
    assert fenced_python(text, "h") == "def f(): return 1\n\nf()\nexit()\n\ndef g(): pass"


def test_the_function_under_test_is_read_from_assertions():
    assert called_function(["assert set(similar((3, 4))) == {4}"]) == "similar"
    assert called_function(["assert (", "assert not check(1)"]) == "check"
    assert called_function(["x = 1"]) is None
    assert called_function(["assert sum(10, 15) == 6", "assert abs(sum(5, 9)) == 1"]) == "sum"


SPANS = [
    "def f(a):\n    return a\n```\nThat is it.",
    "Sure!\n```python\nimport os\ndef f(a):\n    return a\n```\nprint it",
    "only prose, no code at all\nmore prose (",
    "one line",
    "",
    "x = 1\n\n\ny = 2\n",
    "\n\nx = 1\ny = )\nz = 1\nw = 2\nv = 3",
    "a = 1\nb = 2\n)\nc = 1\nd = 2",  # equals: the first span
    "    return a + b\n```",
    "def f():\n    pass\n\nclass A:\n    def g(self):\n        return 1\n!!",
]


@pytest.mark.parametrize("text", SPANS)
def test_the_longest_python_is_what_evalplus_finds(text):
    import evalplus.sanitize

    original = _original_extraction()
    assert longest_python(text) == original(text)
    expected = _with(original, lambda: evalplus.sanitize.sanitize(text, "f"))
    assert sanitized(text, "f") == expected


def _original_extraction():
    """EvalPlus' own function, whatever has been put in its place since."""
    import importlib.util

    spec = importlib.util.find_spec("evalplus.sanitize")
    assert spec and spec.loader
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh.code_extract


def _with(extraction, function):
    import evalplus.sanitize

    before = evalplus.sanitize.code_extract
    evalplus.sanitize.code_extract = extraction
    try:
        return function()
    finally:
        evalplus.sanitize.code_extract = before


LINES = [
    *(
        "",
        "   ",
        "x = 1",
        "def f():",
        "    return 1",
        "    '''doc",
        "    '''",
        '"""',
        "```",
        "```python",
    ),
    *(
        "Don't do it",
        "It is so",
        "1. foo",
        "(",
        ")",
        "x = [",
        "  1,",
        "]",
        "# note",
        "if x:",
        "    pass",
    ),
    *(
        "else:",
        "try:",
        "\\",
        "a = \\",
        "@d",
        "class A:",
        "\tx=1",
        "word",
        "Note:",
        "f'{x",
        "}",
        "'",
    ),
    *(
        "async def g():",
        "    await x",
        "match x:",
        "    case 1:",
        "print(",
        "\x0c",
        "x = 1 \\",
        "a\rb",
    ),
]


def test_any_text_is_extracted_as_evalplus_does():
    """Brackets, quotes, decorators and blocks that the end of a span leaves open, or not."""
    original, draw = _original_extraction(), random.Random(0)
    for _ in range(1500):
        text = "\n".join(draw.choices(LINES, k=draw.randint(1, 9)))
        assert longest_python(text) == original(text), text


PROSE = "The function adds what it is given; it doesn't look at anything else.\n"
LONG = "def f(a):\n    '''Doc.'''\n    return a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n" * 1500 + "```\nend", "\n".join(["x = 1"] * 1500)),
        (f"{LONG}{END}\n" + PROSE * 3000, LONG),
        (f"{LONG}{END}\nor else\n{PY}" * 500, LONG),
    ],
)
def test_long_texts_are_extracted_without_trying_every_span(monkeypatch, text, expected):
    """Parses per line, whose number EvalPlus lets grow with the text: 1500 here on average."""
    parses = []
    for name in ("syntax_check", "_is_refused"):
        real = getattr(code_sanitizer, name)
        monkeypatch.setattr(
            code_sanitizer, name, lambda span, real=real: parses.append(1) or real(span)
        )
    assert longest_python(text) == expected
    assert len(parses) < 10 * len(text.split("\n"))


OUTPUTS = [
    # output, expected, LiveCodeBench's rule, words
    ("3\n", "3", True, True),
    ("3", "4", False, False),
    ("1 2\n3 4\n", "1 2\n3 4", True, True),
    ("1 2\n\n 3 4 \n", "1 2\n3 4", True, True),
    ("1 2 3 4", "1 2\n3 4", False, True),
    ("1  2", "1 2", True, True),
    ("0.3333333", "0.3333334", True, False),
    ("0.33", "0.34", False, False),
    ("3.0", "3", True, False),
    ("1000000007", "1000000008", False, False),
    ("1e3", "1000", True, False),
    ("nan", "nan", True, True),
    ("nan", "1.0", False, False),
    ("inf", "1e308", False, False),
    ("Yes", "YES", False, False),
    ("", "", True, True),
    ("\n", "", True, True),
    ("x", "", False, False),
    ("a 1.0000001", "a 1.0", True, False),
    ("1e999999999", "1.5", False, False),
]


@pytest.mark.parametrize(("output", "expected", "lines", "words"), OUTPUTS)
def test_outputs_are_compared(output, expected, lines, words):
    assert same_lines(output, expected) is lines
    assert same_words(output, expected) is words


def test_values_are_equal_up_to_tuples():
    assert same_value(([1, (2,)],), [[1, [2]]])
    assert not same_value([1], [1, 2])
    assert not same_value("1", 1)


@pytest.mark.parametrize(
    ("dataset", "entry", "arguments", "value", "expected", "right"),
    [
        ("humaneval", "f", [], 0.1 + 0.2, 0.3, True),
        ("humaneval", "f", [], [1.0, 2.0000001], [1.0, 2.0], True),
        ("humaneval", "f", [], (1.0,), [1.0000001], False),
        ("humaneval", "f", [], [1.0], [1.0, 1.0], False),
        ("humaneval", "f", [], "1", 1, False),
        ("humaneval", "f", [], 2, 2.0, True),
        ("humaneval", "f", [], [[]], [1.0], False),  # numpy finds no difference in nothing
        ("humaneval", "find_zero", [[-6, 11, -6, 1]], 1.0, 99, True),
        ("humaneval", "find_zero", [[-6, 11, -6, 1]], 1.5, 1.0, False),
        ("mbpp", "are_equivalent", [], 5, 6, True),
        ("mbpp", "sum_div", [], 0, 7, True),
        ("mbpp", "similar_elements", [], [3, 1], (1, 3), True),
        ("mbpp", "check_str", [], "match", True, True),
        ("mbpp", "check_str", [], None, True, False),
        ("mbpp", "check_str", [], False, False, True),
        ("mbpp", "digit_distance_nums", [1, 2], 1, 9, True),
    ],
)
def test_the_oracle_agrees_with_evalplus_rules(dataset, entry, arguments, value, expected, right):
    oracle = Oracle(dataset, entry, 1e-4 if entry == "find_zero" else 0)
    assert oracle.agrees(arguments, value, expected) is right


def test_a_value_does_not_take_the_oracle_long():
    colliding = [n * (2**61 - 1) for n in range(60_000)]
    with pytest.raises(ValueError, match="one hash"):
        Oracle("mbpp", "similar_elements", 0).agrees([], colliding, (1, 3))


# HumanEval and MBPP.

PROBLEM = {
    "task_id": "HumanEval/900",
    "prompt": 'def add(a: int, b: int) -> int:\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "contract": "",
    "base_input": [[1, 2], [3, 4]],
    "plus_input": [[0, -1]],
    "atol": 0,
}
QUESTION = {"task_id": "HumanEval/900", "question": PROBLEM["prompt"]}
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(5, 6) == 11\n"
# response (it goes on inside a fence), base, plus, flag
HUMANEVAL_CASES = [
    (f"def add(a, b):\n    return a + b{END}\nDone.", True, True, None),
    (f"{PY}def add(a, b):\n    return b + a{END}", True, True, None),
    ("def add(a, b):\n    return abs(a + b)\n```", True, False, None),
    ("def add(a, b):\n    return a - b\n```", False, False, "wrong_answer"),
    ("def add(a, b):\n    while True:\n        a += 1\n    return a\n", False, False, "timeout"),
    ("def add(a, b):\n    raise SystemExit(0)\n    return 3\n", False, False, "runtime_error"),
    ("import os\ndef add(a, b):\n    return os._exit(0)\n", False, False, "runtime_error"),
    (
        "class Any:\n    def __eq__(self, other):\n        return True\n"
        "def add(a, b):\n    return Any()\n",
        *(False, False, "wrong_answer"),
    ),
    ("def plus(a, b):\n    return a + b\n", False, False, "runtime_error"),
    (f"def add(a, b):\n    return a + b{END}\n" + PROSE * 1500, True, True, None),
]


def responses(cases):
    return [case[0] for case in cases]


def test_humaneval_is_graded_with_evalplus_file(tmp_path, capfd):
    """A problem whose canonical solution fails is left out, by base inputs, whatever the response,
    or has no plus verdict; the others are graded.
    """
    problems = [
        PROBLEM,
        {**PROBLEM, "task_id": "HumanEval/901", "base_input": [[1, "2"]]},
        {**PROBLEM, "task_id": "HumanEval/902", "plus_input": [[1, "2"]]},
    ]
    questions = [{**QUESTION, "task_id": problem["task_id"]} for problem in problems]
    (tmp_path / "HumanEval.json").write_text(json.dumps(questions))
    lines = "\n".join(json.dumps(problem) for problem in problems)
    (tmp_path / "HumanEvalPlus.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    task = HumanEval()
    rows = task.load(tmp_path)
    assert task.missing(rows) is None
    right, none = HUMANEVAL_CASES[0][0], ""
    asked = [responses(HUMANEVAL_CASES), [right, none], [right, none]]
    grades = task.grade_all([*rows, rows[0]], [*asked, []])
    assert grades[3] == []
    assert [grade.flags for grade in grades[1]] == [["not_scored", "canonical_fails"]] * 2
    assert [(grade.correct, grade.flags) for grade in grades[2]] == [
        (True, ["plus_unavailable"]),
        (False, ["no_answer", "plus_unavailable"]),
    ]
    told = capfd.readouterr().err
    assert "HumanEval/901" in told and "TypeError" in told and "HumanEval/902" in told
    for grade, (response, base, plus, flag) in zip(grades[0], HUMANEVAL_CASES, strict=True):
        assert (grade.correct, grade.scores["plus"]) == (base, plus), response
        assert grade.flags == ([flag] if flag else []), response


def test_humaneval_rows_may_carry_their_own_tests(monkeypatch):
    """And a response that takes too long to read is flagged, not just wrong."""
    monkeypatch.setattr(code_evalplus, "_SANITIZE_SECONDS", 1.0)
    row = {**QUESTION, "entry_point": "add", "test": CHECK}
    cases = [HUMANEVAL_CASES[i] for i in (0, 3, 5, 7)]  # the others: as with EvalPlus' file
    *grades, late = HumanEval().grade_all([row], [[*responses(cases), "(\n" * 5000]])[0]
    for grade, case in zip(grades, cases, strict=True):
        assert grade.correct == case[1], case[0]
        assert "plus_unavailable" in grade.flags
    assert (late.correct, late.flags) == (False, ["no_answer", "extraction_timeout"])


class NoJails:
    """A sandbox whose every jail is lost."""

    workers = 1

    def map(self, function, items):
        return [function(item) for item in items]

    def run(self, job, lost):
        return lost


def test_responses_whose_jail_is_lost_are_flagged_as_such(monkeypatch):
    monkeypatch.setattr("evaluation.tasks.evalplus.default_sandbox", NoJails)
    row = {**QUESTION, "entry_point": "add", "test": CHECK}
    [grade] = HumanEval().grade_all([row], [["def add(a, b):\n    return a + b"]])[0]
    assert (grade.correct, grade.flags) == (False, ["sandbox_lost"])


class NotedJails(Sandbox):
    """A real sandbox that notes what each of its jails loads, and loses one before its third."""

    def __init__(self):
        super().__init__(workers=1)
        self.loaded: list[list[str]] = []

    def open(self):
        jail, loaded = super().open(), []
        self.loaded.append(loaded)

        def load(source, real=jail.load):
            if len(self.loaded) == 1 and len(loaded) == 2:
                raise JailLost("once")
            loaded.append(source)
            real(source)

        jail.load = load
        return jail


def test_a_program_has_a_jail_of_its_own_where_no_expected_value_has_been(monkeypatch):
    """Claim: canonical solutions share a jail, which goes on in another where it is lost; a program
    has one for its base and its plus tests, a process each, and nothing else is loaded there."""
    problems = [PROBLEM | {"task_id": f"HumanEval/{number}"} for number in (0, 1)]
    task, sandbox = HumanEval(), NotedJails()
    task.problems = {problem["task_id"]: problem for problem in problems}
    monkeypatch.setattr("evaluation.tasks.evalplus.default_sandbox", lambda: sandbox)
    asked = [problem | {"question": PROBLEM["prompt"]} for problem in problems]
    right, wrong = (PROBLEM["prompt"] + f"    return {text}\n" for text in ("a + b", "a - b"))
    monkeypatch.setattr(
        code_evalplus,
        "sanitize",
        lambda _, texts: [code_evalplus.Extraction(program=text) for text, _ in texts],
    )
    grades = task.grade_all(asked, [[right, wrong], [wrong]])
    assert [[grade.correct for grade in row] for row in grades] == [[True, False], [False]]
    canonical = PROBLEM["prompt"] + PROBLEM["canonical_solution"]
    kinds = 2  # base and plus
    assert sandbox.loaded == [
        *([canonical] * kinds, [canonical] * kinds),
        *([right] * kinds, [wrong], [wrong]),
    ]


class SlowJail:
    """A program of the right answers, ``seconds`` of CPU time each; records the limits."""

    def __init__(self, seconds):
        self.seconds, self.limits = seconds, []

    def load(self, source):
        pass

    def start(self, *, cpu):
        self.limits.append(cpu)
        return Outcome(status="ok", cpu_seconds=0.5)

    def calls(self, name, arguments, *, cpu, total, within):
        self.limits += cpu
        used = 0.0
        for _ in arguments:
            used += self.seconds
            if used > total:  # as the jail does
                yield Outcome(status="cpu_time", cpu_seconds=self.seconds)
                return
            yield Outcome(status="ok", cpu_seconds=self.seconds, value="3")


@pytest.mark.parametrize(
    ("tests", "seconds", "status", "ran"),
    [
        (100, 0.9, "timeout", 67),  # 0.5 + 68 * 0.9 is the first above 61
        (100, 0.6, "passed", 100),
        (2, 0.9, "passed", 2),
    ],
)
def test_all_tests_of_a_problem_share_evalplus_limit(tests, seconds, status, ran):
    """min(60, the sum of the tests' limits, 1 s each here) + 1, the definitions included."""
    known = {"arguments": ["[1, 2]"] * tests, "values": [3] * tests}
    right = code_expected.Expected(**known, seconds=[0.01] * tests)
    jail = SlowJail(seconds)
    verdict = code_evalplus.check(cast(Jail, jail), HUMANEVAL, PROBLEM, "", [[1, 2]] * tests, right)
    assert (verdict.status, verdict.passed) == (status, ran)
    assert jail.limits[0] == min(60, tests) + 1
    assert max(jail.limits[1:]) == 1.0 and all(limit > 0 for limit in jail.limits)


# Without EvalPlus, or without a sandbox: skipped before anything is generated.


def test_without_evalplus_its_tasks_are_missing(tmp_path, monkeypatch):
    """Rows with tests of their own, too: it extracts programs. MBPP's file is read without."""
    monkeypatch.setattr(code_evalplus, "package_directories", lambda: [str(tmp_path)])
    row = {**QUESTION, "entry_point": "add", "test": CHECK}
    assert "evalplus, tree_sitter" in (HumanEval().missing([row]) or "")
    (tmp_path / "MBPP.json").write_text(json.dumps([{"task_id": "Mbpp/2", "question": "q"}]))
    (tmp_path / "MbppPlus.jsonl").write_text(json.dumps({**PROBLEM, "task_id": "Mbpp/2"}))
    task = MBPP()
    assert "run launch/setup.sh" in (task.missing(task.load(tmp_path)) or "")
    monkeypatch.undo()
    monkeypatch.setattr(code_evalplus, "unseen_modules", lambda names: names[1:2])
    assert "do not see tree_sitter (installed as links?)" in (HumanEval().missing([row]) or "")


def test_without_a_sandbox_tasks_that_run_programs_are_missing(monkeypatch):
    def refuse(best_effort):
        raise RunError("programs cannot be run safely here; run as an ordinary user")

    monkeypatch.setattr(evaluation.jail.sandbox, "_default", None)
    monkeypatch.setattr(evaluation.jail.sandbox, "Sandbox", refuse)
    carried = {**QUESTION, "test_list": ["assert add(1, 2) == 3"]}
    probe = {"question": "q", "domain": "code", "tests_json": "['assert f(1) == 2']"}
    for task, row in [
        (HumanEval(), carried),
        (MBPP(), carried),
        (LiveCodeBench(), {"question": "q"}),
        (Codeforces(), {"question": "q"}),
        (OPDLMTrain(), probe),
    ]:
        assert "run as an ordinary user" in (task.missing([row]) or ""), task.name
    assert OPDLMTrain().missing([{"question": "q", "ground_truth_answer": "1"}]) is None


def test_tests_use_the_benchmarks_helpers_not_the_programs():
    row = {
        "question": "def poly(x): return x * 2\ndef f(x):\n",
        "canonical_solution": "    return x\n",
        "test": "def check(candidate):\n    assert poly(candidate(1)) == 2\n",
    }
    tests = own_tests(row, "f")
    assert tests["setup"][0].startswith("def poly") and tests["functions"] == ["f"]
    program = "def poly(x): return 2\ndef f(x): return 7"
    grade = HumanEval().grade_all(
        [{"task_id": "x", "entry_point": "f", **row}], [[program, "def f(x):\n    return 1"]]
    )[0]
    assert [g.correct for g in grade] == [False, True]


def test_problems_without_tests_are_missing_not_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    (tmp_path / "HumanEval.json").write_text(json.dumps([QUESTION]))
    task = HumanEval()
    assert "HumanEvalPlus.jsonl.gz" in (task.missing(task.load(tmp_path)) or "")
    (tmp_path / "HumanEvalPlus.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"HumanEvalPlus\.jsonl: not a file of EvalPlus"):
        find_problems(HUMANEVAL, tmp_path)


def test_mbpp_inputs_have_their_types_back_and_rows_may_carry_assertions():
    problem = {
        "task_id": "Mbpp/2",
        "question": "Write a function to find the shared elements.",
        "prompt": '"""Shared elements."""\n',
        "entry_point": "similar_elements",
        "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
        "plus_input": [],
        "atol": 0,
    }
    carried = {
        "task_id": "Mbpp/3",
        "question": "Write a function.",
        "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"],
    }
    tuples = "def similar_elements(a, b):\n    return [x for x in a + (b and ()) if x in b]\n"
    summed = {**carried, "test_list": ["assert sum(10, 15) == 6"]}
    [[grade]] = MBPP().grade_all([summed], [["def sum(a, b):\n    return 6\n"]])
    assert grade.correct
    twice = ["def twice(x):\n    return 2 * x\n", "def twice(x):\n    return 4\n"]
    grades = MBPP().grade_all([problem, carried], [[tuples], twice])
    assert [[g.correct for g in row] for row in grades] == [[True], [True, False]]


def test_the_evalplus_prompt_ends_inside_an_open_fence():
    user, assistant = HumanEval().prompt(QUESTION)["messages"]
    assert user["content"].endswith(
        '```\ndef add(a: int, b: int) -> int:\n    """The sum."""\n```\n'
    )
    assert assistant["content"].endswith("corresponding tests:\n```python\n")


# LiveCodeBench.


def test_lcb_programs_read_stdin_or_are_called():
    stdin = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"], "fn_name": None}
    called = {"inputs": ["[1, 2]\n3"], "outputs": ["[[1, 2], [3]]"], "fn_name": "join"}
    cases = [
        (stdin, "print(sum(map(int, input().split())))", None),
        (stdin, "if __name__ == '__main__':\n    print(eval('+'.join(input().split())))", None),
        (stdin, "print(Counter(input().split()).total() + 1)", "wrong_answer"),
        (stdin, "a, b = map(int, input().split())\nprint(a + b)\n1 / 0", "runtime_error"),
        (stdin, "sys.exit(0)", "wrong_answer"),
        (
            called,
            "class Solution:\n    def join(self, a: List[int], b):\n        return a, [b]",
            None,
        ),
        (called, "def join(a, b): return (a, (b,))", None),
        (called, "def join(a, b): return [a, b]", "wrong_answer"),
        (called, "sys.exit(0)", "runtime_error"),
    ]
    rows = [{"question": "q", "input_output": json.dumps(tests)} for tests, _, _ in cases]
    texts = [[f"```python\n{source}\n```"] for _, source, _ in cases]
    for (grade,), (_, source, flag) in zip(
        LiveCodeBench().grade_all(rows, texts), cases, strict=True
    ):
        assert (grade.correct, grade.flags) == (flag is None, [flag] if flag else []), source


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_private_tests_are_read_without_running_what_they_hold(capsys):
    cases = [{"input": "1", "output": "2"}]
    assert code_lcb.read_private_tests(json.dumps(cases)) == cases
    assert code_lcb.read_private_tests(packed(json.dumps(cases))) == cases
    for bad in (packed(Evil()), packed([1]), "%%%", packed("{"), base64.b64encode(b"x").decode()):
        with pytest.raises(ValueError):
            code_lcb.read_private_tests(bad)
    assert capsys.readouterr().out == ""
    row = {
        "public_test_cases": json.dumps([{"input": "0", "output": "1"}]),
        "private_test_cases": packed(json.dumps(cases)),
        "metadata": json.dumps({"func_name": "f"}),
    }
    assert code_lcb.tests_of(row) == code_lcb.Tests(
        inputs=["0", "1"], outputs=["1", "2"], function="f"
    )


def test_lcb_rows_without_readable_tests_are_refused():
    task = LiveCodeBench()
    for tests in ("{}", "no", '{"inputs": [], "outputs": []}', '{"inputs": ["1"], "outputs": []}'):
        assert task.problem_of({"question": "q", "input_output": tests})


@pytest.mark.parametrize(("given", "expected"), [("abc", "1"), ("1", "abc"), ("1\n[", "1")])
def test_lcb_calls_are_read_with_their_row(tmp_path, given, expected):
    """Not when they are graded, where one bad row would cost every other's verdict."""
    tests = {"fn_name": "f", "inputs": ["1", given], "outputs": ["1", expected]}
    rows = [{"question": "q", "input_output": json.dumps(tests)}]
    (tmp_path / "LCB_v6.json").write_text(json.dumps(rows))
    with pytest.raises(
        InputError, match=r"row 0: its tests cannot be read \(test 1 of the function"
    ):
        LiveCodeBench().load(tmp_path)
    plain = {**tests, "fn_name": None}
    assert not LiveCodeBench().problem_of({"question": "q", "input_output": json.dumps(plain)})


# Codeforces.


def test_codeforces_programs_print_the_expected_words():
    row = {
        "question": "Add {two}",
        "test_input": ["1 2\n", "5 5\n"],
        "test_output": ["3\n", "10\n"],
        "test_time_limit": 1,
    }
    cases = [
        ("print(sum(map(int, input().split())), '\\n')", None),
        ("a, b = map(int, input('n: ').split())\nprint(a + b)", None),  # a prompt is no output
        ("print(3)", "wrong_answer"),
        ("while True: pass", "timeout"),
        ("print(3); raise ValueError", "runtime_error"),
        ("print(sum(map(int, open(0).read().split()))); exit()", None),
        ("import os; os._exit(0)", "wrong_answer"),
    ]
    texts = [f"```python\n{source}\n```" for source, _ in cases]
    task = Codeforces()
    assert task.problem_of(row) is None
    grades = task.grade_all([row], [[*texts, "no program"]])[0]
    expected = [[flag] if flag else [] for _, flag in cases]
    assert [grade.flags for grade in grades] == [*expected, ["no_answer"]]
    assert [grade.correct for grade in grades] == [not flags for flags in [*expected, ["x"]]]
    assert "Add {two}" in task.prompt(row)["messages"][0]["content"]


@pytest.mark.parametrize(
    "change",
    [{"test_output": []}, {"test_input": [1, 2]}, {"test_time_limit": 0}, {"test_method": "f"}],
)
def test_codeforces_rows_are_checked(change):
    row = {"question": "q", "test_input": ["1", "2"], "test_output": ["1", "2"]}
    assert Codeforces().problem_of(row) is None
    assert Codeforces().problem_of({**row, **change})


# The training rows' tests.

PROBES = [
    ('["assert f(1) == 2", "assert f(2) == 3"]', "def f(x): return x + 1", True),
    ("['assert f(1) == 2']", "def f(x): return x", False),
    ("['assert f(1) == 2']", "import sys; sys.exit(0)", False),
    (
        {
            "type": "pytest",
            "fn_name": "f",
            "test_code": "from solution import f\ndef test_f(): assert f(1) == 2",
        },
        *("def f(x): return 2", True),
    ),
    (
        {
            "type": "pytest",
            "fn_name": "f",
            "test_code": "from solution import f\ndef test_f(): assert f(1) == 2",
        },
        *("import os; os._exit(0)", False),
    ),
    (
        {"type": "stdio", "cases": [{"input": "2\n", "output": "4"}]},
        "print(int(input()) * 2)",
        True,
    ),
    ({"type": "stdio", "cases": [{"input": "2\n", "output": "4"}]}, "exit(0)", False),
    (
        {"type": "fn_call", "fn_name": "f", "cases": [{"args": [1, [2]], "expected": [3]}]},
        *("def f(a, b): return a + b[0]", True),
    ),
    (
        {"type": "fn_call", "fn_name": "f", "cases": [{"args": [1], "expected": [1, 1]}]},
        *("def f(a): return (a, a)", True),
    ),
    (
        {"type": "fn_call", "fn_name": "f", "cases": [{"args": [1], "expected": [1]}]},
        *("def f(a): raise SystemExit(0)", False),
    ),
]


def test_the_four_shapes_of_training_tests(sandbox):
    rows = [
        {"tests_json": tests if isinstance(tests, str) else json.dumps(tests)}
        for tests, _, _ in PROBES
    ]
    programs = [
        [code_probe.program_of(row, f"{PY}{source}{END}")]
        for row, (_, source, _) in zip(rows, PROBES, strict=True)
    ]
    grades = grade_programs(sandbox, rows, programs, code_probe.check)
    assert [row[0].correct for row in grades] == [right for _, _, right in PROBES]


def test_a_training_row_without_a_comparable_answer_is_left_out_alone(tmp_path):
    letter = {"question": "q\nA. x\nB. y", "domain": "science", "ground_truth_answer": "B"}
    words = {**letter, "ground_truth_answer": "none of these"}
    (tmp_path / "opdlm_train.json").write_text(
        json.dumps([words, letter, {**words, "domain": "x"}])
    )
    task = OPDLMTrain()
    rows = task.load(tmp_path)
    graded = task.grade_all(rows, [["B"], ['"answer": "B"', '"answer": "A"'], ["x"]])
    assert [[grade.flags for grade in row] for row in graded] == [
        [["not_scored"]],
        [[], []],
        [["not_scored"]],
    ]
    assert [grade.correct for grade in graded[1]] == [True, False]
    del letter["ground_truth_answer"]  # a file of another form
    (tmp_path / "opdlm_train.json").write_text(json.dumps([words, letter]))
    with pytest.raises(InputError, match="row 1: needs 'ground_truth_answer'"):
        task.load(tmp_path)


@pytest.mark.parametrize(
    "tests",
    [
        *(None, "", "5", "[]", "[1]", "{}", '{"type": "stdio", "cases": []}', "not json at all"),
        '{"type": "fn_call", "fn_name": "f", "cases": [{"args": "1", "expected": [1]}]}',
        '{"type": "pytest", "test_code": ""}',
    ],
)
def test_other_tests_cannot_be_scored(tests):
    assert code_probe.read_tests(tests) is None
