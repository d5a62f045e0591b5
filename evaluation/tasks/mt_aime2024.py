"""MT-AIME2024: the 30 problems of AIME 2024 in 55 languages; the instruction stays English."""

from evaluation.tasks.math_problem import MathProblem


class MTAIME2024(MathProblem):
    name = "MT-AIME2024"
    file = "MT_AIME2024.json"
