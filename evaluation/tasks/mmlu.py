"""MMLU: general knowledge, four options."""

from evaluation.tasks.multiple_choice import MultipleChoice


class MMLU(MultipleChoice):
    name = "MMLU"
    file = "MMLU.json"
    letters = "ABCD"
    reformats_options = True
