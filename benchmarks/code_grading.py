"""CPU seconds of grading the canonical solutions of HumanEval or MBPP, base and plus tests, in the
sandbox.

python -m benchmarks.code_grading --data DIR [--task MBPP]    (with HumanEvalPlus.jsonl or
MbppPlus.jsonl, or .gz)
"""

import resource
from pathlib import Path

from evaluation.grading.code_evalplus import find_problems
from evaluation.jail import prepared
from evaluation.jail.sandbox import default_sandbox
from evaluation.tasks import get_task
from evaluation.tasks.evalplus import EvalPlusTask
from megatron_opdlm.errors import Arguments, InputError, command


def cpu_seconds() -> float:
    """Of this process and of its children, the jails and the process that they are forked from."""
    with default_sandbox().open():  # a fork collects the jails that have ended
        pass
    prepared.close()
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--task", choices=["HumanEval", "MBPP"], default="HumanEval")
    args = parser.parse_args()
    task = get_task(args.task)
    assert isinstance(task, EvalPlusTask)
    problems = [*find_problems(task.source, args.data).values()]
    if not problems:
        raise InputError(
            f"--data {args.data}: holds no {task.source.stem}.jsonl; {task.source.remedy}"
        )
    rows = [problem | {"question": problem["prompt"]} for problem in problems]
    texts = [[row["prompt"] + row["canonical_solution"] + "\n```"] for row in rows]
    task.missing(rows)  # probes the sandbox
    before = cpu_seconds()
    grades = [grade for [grade] in task.grade_all(rows, texts)]
    seconds = cpu_seconds() - before
    right = sum(grade.correct for grade in grades)
    plus = sum(grade.scores.get("plus") == 1.0 for grade in grades)
    print(f"{right} of {len(grades)} right, {plus} by all tests, {seconds:.1f} CPU seconds")


if __name__ == "__main__":
    command(main)
