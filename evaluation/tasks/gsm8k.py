"""GSM8K: grade-school word problems, 1,319."""

from evaluation.tasks.math_problem import MathProblem


class GSM8K(MathProblem):
    name = "GSM8K"
    file = "GSM8K.json"
