"""What HumanEval and MBPP share: EvalPlus' prompt, extraction and verdict (base pass@1).

Tests come from EvalPlus' own file; where that is not there, from the row itself: an EvalPlus
problem (``base_input``, ``canonical_solution``), HumanEval's ``test`` with ``check(candidate)``, or
MBPP's ``test_list``. Then there may be no plus verdict, and the flag ``plus_unavailable`` says so.
"""

import re
import sys
from pathlib import Path
from typing import Any, ClassVar

from evaluation.grading import code_evalplus as evalplus
from evaluation.grading.code_run import LOST, Verdict, run_tests
from evaluation.grading.code_text import called_function
from evaluation.jail.sandbox import Jail, Sandbox, default_sandbox, sandbox_problem
from evaluation.tasks.programs import grade_of
from evaluation.tasks.task import NOT_SCORED, Grade, Row, Task

# EvalPlus' two strings.
_INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a "
    "markdown code block:"
)
_PREFILL = (
    "Below is a Python script with a self-contained function that solves the problem and passes "
    "corresponding tests:"
)
_OWN_TESTS_SECONDS = 10.0  # of CPU time, for all tests that a row carries
_DEFINITION = re.compile(r"^\s*def\s+(\w+)\s*\(", re.MULTILINE)


class EvalPlusTask(Task):
    """Base pass@1 counts; ``scores["plus"]`` is base and plus together."""

    samples_pass_at_k: ClassVar[bool] = True
    may_think: ClassVar[bool] = False  # as the paper's code asks
    source: ClassVar[evalplus.Source]

    def __init__(self) -> None:
        self.problems: dict[str, evalplus.Problem] = {}

    def load(self, data_dir: Path) -> list[Row]:
        self.problems = evalplus.find_problems(self.source, data_dir)
        return super().load(data_dir)

    def problem_of(self, row: Row) -> str | None:
        for key in ("task_id", "question"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                return f"needs {key!r}; {self.how_to_get}"
        return None

    def missing(self, rows: list[Row]) -> str | None:
        bare = [row for row in rows if self.problem(row) is None and not _carries_tests(row)]
        if not bare:
            return evalplus.lacks() or sandbox_problem()
        return (
            f"the tests of {len(bare)} problems (first: {bare[0]['task_id']}); {self.source.remedy}"
        )

    def settings(self) -> dict[str, Any]:
        return {"sandbox": default_sandbox().describe()}

    def problem(self, row: Row) -> evalplus.Problem | None:
        """EvalPlus' problem of a row: from its file, else from the row."""
        found = self.problems.get(str(row["task_id"]))
        if found is None and evalplus.is_problem(row):
            return evalplus.prepared(self.source, row)
        return found

    def prompt(self, row: Row) -> Row:
        question = row["question"].strip()
        return {
            "messages": [
                {"role": "user", "content": f"{_INSTRUCTION}\n```\n{question}\n```\n"},
                {"role": "assistant", "content": f"{_PREFILL}\n```python\n"},
            ]
        }

    def entry_point(self, row: Row) -> str:
        """The function asked for: as EvalPlus or the row say, else as the tests or prompt do."""
        problem = self.problem(row)
        named = (problem or {}).get("entry_point") or row.get("entry_point")
        if named:
            return str(named)
        tested = called_function(_assertions(row))
        defined = _DEFINITION.findall(row["question"])
        return tested or (defined[-1] if defined else "")

    def grade(self, row: Row, response: str) -> Grade:
        return self.grade_all([row], [[response]])[0][0]

    def grade_all(self, rows: list[Row], responses: list[list[str]]) -> list[list[Grade]]:
        sandbox = default_sandbox()
        entries = [self.entry_point(row) for row in rows]
        texts = [(text, entries[i]) for i, row in enumerate(responses) for text in row]
        found = iter(evalplus.sanitize(sandbox, texts))
        jobs = [
            (row, [next(found) for _ in given]) for row, given in zip(rows, responses, strict=True)
        ]
        return sandbox.map(lambda job: self._grade_problem(sandbox, *job), jobs)

    def _grade_problem(
        self, sandbox: Sandbox, row: Row, found: list[evalplus.Extraction]
    ) -> list[Grade]:
        """All programs of a problem: its expected values are computed once."""
        problem = self.problem(row)
        if problem is None or not found:
            return [self._grade_by_row(sandbox, row, one) for one in found]
        programs = [one.program for one in found]
        try:
            base = self._verdicts(sandbox, problem, programs, "base_input")
        except evalplus.CanonicalFails as error:
            self._tell(f"{error}; the problem is left out")
            return [_left_out(program) for program in programs]
        passing = [p if v and v.correct else "" for p, v in zip(programs, base, strict=True)]
        plus = self._plus(sandbox, problem, passing)
        if plus is None:
            return [
                _without_plus(grade_of(one.program, verdict, one.problem))
                for one, verdict in zip(found, base, strict=True)
            ]
        return [
            grade_of(one.program, verdict, one.problem, scores={"plus": float(passed)})
            for one, verdict, passed in zip(found, base, plus, strict=True)
        ]

    def _plus(
        self, sandbox: Sandbox, problem: evalplus.Problem, programs: list[str]
    ) -> list[bool] | None:
        """Which programs, of those that passed the base tests, pass the others; None: no tests."""
        if not problem.get("plus_input"):
            return None
        if not any(programs):
            return [False] * len(programs)
        try:
            verdicts = self._verdicts(sandbox, problem, programs, "plus_input")
        except evalplus.CanonicalFails as error:
            self._tell(f"{error}; the problem has no plus verdict")
            return None
        return [verdict is not None and verdict.correct for verdict in verdicts]

    def _tell(self, what: str) -> None:
        print(f"warning: {self.name}: the canonical solution fails: {what}", file=sys.stderr)

    def _verdicts(
        self, sandbox: Sandbox, problem: evalplus.Problem, programs: list[str], kind: str
    ) -> list[Verdict | None]:
        """None for empty programs, which do not run. CanonicalFails: the problem's own does not,
        whatever the programs, so that it does not depend on them which problems count.
        """
        inputs = problem[kind]
        right = sandbox.run(lambda jail: evalplus.expected_of(jail, problem, inputs), None)
        if right is None:
            return [LOST if program else None for program in programs]

        def verdict_on(program: str) -> Verdict:
            def job(jail: Jail) -> Verdict:
                return evalplus.check(jail, self.source, problem, program, inputs, right)

            return sandbox.run(job, LOST)

        return [verdict_on(program) if program else None for program in programs]

    def _grade_by_row(self, sandbox: Sandbox, row: Row, found: evalplus.Extraction) -> Grade:
        program = found.program
        if not program:
            return grade_of("", None, found.problem)
        tests = own_tests(row, self.entry_point(row))

        def job(jail: Jail) -> Verdict:
            return run_tests(jail, program, cpu=_OWN_TESTS_SECONDS, **tests)

        return _without_plus(grade_of(program, sandbox.run(job, LOST)))


def _left_out(program: str) -> Grade:
    flags = [NOT_SCORED, "canonical_fails"]
    return Grade(correct=False, extracted=program or None, flags=flags)


def _without_plus(grade: Grade) -> Grade:
    grade.flags.append("plus_unavailable")
    return grade


def _assertions(row: Row) -> list[str]:
    given = row.get("test_list") or row.get("assertion") or []
    return [given] if isinstance(given, str) else list(given)


def _carries_tests(row: Row) -> bool:
    return bool(_assertions(row)) or bool(row.get("test"))


def own_tests(row: Row, entry_point: str) -> dict[str, Any]:
    """The tests that a row carries, as ``run_tests`` takes them.

    The prompt with its solution runs first, so that helpers which tests use (``poly`` of
    HumanEval/32) are the benchmark's and not the program's.
    """
    setup = [str(row[key]) for key in ("test_setup_code",) if row.get(key)]
    imports = row.get("test_imports") or []
    setup += [imports] if isinstance(imports, str) else [str(line) for line in imports]
    test = str(row.get("test") or "")
    if _assertions(row) and "def check" not in test:
        snippets = _assertions(row)
    elif "def check" in test:
        setup += [*_reference(row), test]
        snippets = [f"check({entry_point})"]
    else:
        snippets = [test]
    return {"setup": setup, "functions": [entry_point], "snippets": snippets}


def _reference(row: Row) -> list[str]:
    solution = row.get("canonical_solution")
    return [row["question"] + solution] if isinstance(solution, str) else []
