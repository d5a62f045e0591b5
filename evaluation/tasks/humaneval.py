"""HumanEval (Chen et al., arXiv 2107.03374) with EvalPlus' prompt and tests."""

from typing import ClassVar

from evaluation.grading.code_evalplus import HUMANEVAL, Source
from evaluation.tasks.evalplus import EvalPlusTask


class HumanEval(EvalPlusTask):
    """Rows ``{"task_id": "HumanEval/0", "question", "entry_point"?}``."""

    name = "HumanEval"
    file = "HumanEval.json"
    how_to_get: ClassVar[str] = (
        "fetch it: python -m evaluation.download --data DIR --tasks HumanEval"
    )
    source: ClassVar[Source] = HUMANEVAL
