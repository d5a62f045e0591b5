"""MLogiQA: logical reading in 10 languages, 80 questions each."""

from evaluation.tasks.multiple_choice import MultipleChoice


class MLogiQA(MultipleChoice):
    name = "MLogiQA"
    file = "MLogiQA.json"
