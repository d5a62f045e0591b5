"""MMMLU-lite: MMLU questions in 17 languages, 400 each."""

from evaluation.tasks.multiple_choice import MultipleChoice


class MMMLULite(MultipleChoice):
    name = "MMMLU-lite"
    file = "MMMLU_Lite.json"
