"""MMLU-Pro: harder knowledge questions with up to ten options."""

from evaluation.tasks.multiple_choice import MultipleChoice


class MMLUPro(MultipleChoice):
    name = "MMLU-Pro"
    file = "MMLU_Pro.json"
    reformats_options = True
