"""GPQA-Diamond: 198 graduate science questions; the options were shuffled in the file."""

from evaluation.tasks.multiple_choice import MultipleChoice


class GPQADiamond(MultipleChoice):
    name = "GPQA-Diamond"
    file = "GPQA_Diamond_shuffled.json"
    letters = "ABCD"
    reformats_options = True
