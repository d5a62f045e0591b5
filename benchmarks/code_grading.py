"""CPU seconds of grading HumanEval's canonical solutions, base and plus tests, in the sandbox.

python -m benchmarks.code_grading --data DIR    (with HumanEvalPlus.jsonl or .jsonl.gz)
"""

import resource
from pathlib import Path

from evaluation.grading.code_evalplus import HUMANEVAL, find_problems
from evaluation.jail import prepared
from evaluation.tasks import get_task
from megatron_opdlm.errors import Arguments, InputError, command


def cpu_seconds() -> float:
    """Of this process and of its children; the one that jails are forked from is ended first."""
    prepared.close()
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    problems = [*find_problems(HUMANEVAL, args.data).values()]
    if not problems:
        raise InputError(f"--data {args.data}: holds no HumanEvalPlus.jsonl; {HUMANEVAL.remedy}")
    task = get_task("HumanEval")
    rows = [problem | {"question": problem["prompt"]} for problem in problems]
    texts = [[row["prompt"] + row["canonical_solution"] + "\n```"] for row in rows]
    task.missing(rows)  # probes the sandbox
    before = cpu_seconds()
    grades = [grade for [grade] in task.grade_all(rows, texts)]
    seconds = cpu_seconds() - before
    right = sum(grade.correct and grade.scores.get("plus") == 1.0 for grade in grades)
    print(f"{right} of {len(grades)} right, {seconds:.1f} CPU seconds")


if __name__ == "__main__":
    command(main)
