"""INCLUDE-lite: local exams in 44 languages."""

from evaluation.tasks.multiple_choice import MultipleChoice


class IncludeLite(MultipleChoice):
    name = "INCLUDE-lite"
    file = "INCLUDE_Lite.json"
