"""CEval, validation split: Chinese exams, 52 subjects."""

from evaluation.tasks.multiple_choice import MultipleChoice


class CEval(MultipleChoice):
    name = "CEval"
    file = "CEval.json"
