"""LMB-Hard (LiveMathBench, hard part): 21 English and 24 Chinese problems, asked as SDAR does."""

from evaluation.tasks.math_problem import MathProblem
from evaluation.tasks.task import Row

ENGLISH = (
    "Here is a math question, please reasoning step by step, and put your answer in \\boxed{{}}.\n"
    "{question}\n"
)
CHINESE = "下面是一个数学问题，请逐步推理，并把最终答案放置于\\boxed{{}}中。\n{question}\n"  # noqa: RUF001


class LMBHard(MathProblem):
    """The language of a row is the end of its ``subdivision``: ``..._cn``; all else is English."""

    name = "LMB-Hard"
    file = "LiveMathBench_Hard.json"

    def question(self, row: Row) -> str:
        chinese = str(row.get("subdivision", "")).endswith("_cn")
        return (CHINESE if chinese else ENGLISH).format(question=row["question"])
