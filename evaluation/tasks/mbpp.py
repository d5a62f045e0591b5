"""MBPP (Austin et al., arXiv 2108.07732): the 378 problems of MBPP+, EvalPlus' prompt and tests."""

from typing import ClassVar

from evaluation.grading.code_evalplus import MBPP as MBPP_PLUS
from evaluation.grading.code_evalplus import Source
from evaluation.tasks.evalplus import EvalPlusTask


class MBPP(EvalPlusTask):
    """Rows ``{"task_id": "Mbpp/2", "question", "entry_point"?}``."""

    name = "MBPP"
    file = "MBPP.json"
    how_to_get: ClassVar[str] = "fetch it: python -m evaluation.download --data DIR --tasks MBPP"
    source: ClassVar[Source] = MBPP_PLUS
