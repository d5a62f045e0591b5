"""AIME of 2025: 30 problems; average over many samples (32 is usual)."""

from evaluation.tasks.math_problem import MathProblem


class AIME25(MathProblem):
    name = "AIME-25"
    file = "AIME2025.json"
