"""AIME of 2024: 30 problems; average over many samples (32 is usual)."""

from evaluation.tasks.math_problem import MathProblem


class AIME24(MathProblem):
    name = "AIME-24"
    file = "AIME2024.json"
