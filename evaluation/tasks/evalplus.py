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
from evaluation.grading.code_expected import Rights, rights_of
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
_PROBLEMS_PER_JAIL = 16  # whose expected values are computed in one
_DEFINITION = re.compile(r"^\s*def\s+(\w+)\s*\(", re.MULTILINE)

Job = tuple[Row, list[evalplus.Extraction]]  # a row and its programs


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
        size = min(-(-len(jobs) // sandbox.workers), _PROBLEMS_PER_JAIL) or 1
        parts = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        graded = sandbox.map(lambda part: self._grade_problems(sandbox, part), parts)
        return [grades for part in graded for grades in part]

    def _grade_problems(self, sandbox: Sandbox, jobs: list[Job]) -> list[list[Grade]]:
        """Some rows; their expected values are computed in one jail, no program runs there."""
        problems = [self.problem(row) if found else None for row, found in jobs]
        rights = iter(rights_of(sandbox, [problem for problem in problems if problem is not None]))
        return [
            [self._grade_by_row(sandbox, row, one) for one in found]
            if problem is None
            else self._grade_problem(sandbox, problem, next(rights), found)
            for (row, found), problem in zip(jobs, problems, strict=True)
        ]

    def _grade_problem(
        self,
        sandbox: Sandbox,
        problem: evalplus.Problem,
        rights: Rights | None,
        found: list[evalplus.Extraction],
    ) -> list[Grade]:
        """All programs of a problem. Whether it counts does not depend on them."""
        if rights is None:
            return [grade_of(p.program, LOST if p.program else None, p.problem) for p in found]
        if rights.why:
            what = "is left out" if rights.base is None else "has no plus verdict"
            why = f"the canonical solution fails: {rights.why}; the problem {what}"
            print(f"warning: {self.name}: {why}", file=sys.stderr)
        if rights.base is None:
            return [_left_out(one.program) for one in found]
        return [self._grade_program(sandbox, problem, rights, one) for one in found]

    def _grade_program(
        self,
        sandbox: Sandbox,
        problem: evalplus.Problem,
        rights: Rights,
        found: evalplus.Extraction,
    ) -> Grade:
        """By the base tests and, where it passes them, by the others: a process for each kind, in
        one jail.
        """

        def job(jail: Jail) -> list[Verdict]:
            verdicts: list[Verdict] = []
            for kind, right in (("base_input", rights.base), ("plus_input", rights.plus)):
                if right is not None and all(verdict.correct for verdict in verdicts):
                    given = problem[kind]
                    verdicts.append(
                        evalplus.check(jail, self.source, problem, found.program, given, right)
                    )
            return verdicts

        base, *plus = sandbox.run(job, [LOST]) if found.program else [None]
        if rights.plus is None:
            return _without_plus(grade_of(found.program, base, found.problem))
        scores = {"plus": float(any(verdict.correct for verdict in plus if verdict))}
        return grade_of(found.program, base, found.problem, scores=scores)

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
