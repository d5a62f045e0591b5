"""MATH-500: competition problems."""

from evaluation.tasks.math_problem import MathProblem


class Math500(MathProblem):
    name = "MATH-500"
    file = "MATH500.json"
