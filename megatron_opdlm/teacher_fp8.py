"""The frozen teacher's FP8 linears: their scales come from what the teacher computes on sequences
of the training data (``model.quantization`` has the arithmetic).
"""

from collections.abc import Sequence

import torch

from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.quantization import calibrate_fp8, compress_fp8
from megatron_opdlm.packing.finished import FinishedBatch
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.records import Prompt, State
from megatron_opdlm.teacher import score


def calibration_sequences(
    prompts: Sequence[Prompt], count: int, max_positions: int
) -> list[list[int]]:
    """The first ``count`` prompts of the file, with their recorded responses where they have one,
    of at most ``max_positions`` tokens: a pure function of the file, so that a resumed run gets the
    same scales.
    """
    return [[*p.ids, *(p.response_ids or [])][:max_positions] for p in prompts[:count]]


def quantize_fp8(
    teacher: LanguageModel, sequences: Sequence[Sequence[int]], packing: Packing
) -> None:
    """Replace the layers' linears by FP8 ones, in place; embedding, norms and output head stay.
    ``sequences``: token ids, the same on every rank.

    RunError where a linear saw nothing to take a scale from.
    """
    batches = _calibration_batches(sequences, packing)

    def run_all(_: torch.nn.Module) -> None:
        for batch in batches:  # one at a time: the hidden states are not kept
            score(teacher, [batch])

    calibrate_fp8(
        teacher,
        run_all,
        whose="the teacher's",
        remedy="check teacher.path, or use teacher.quantization=none",
    )
    compress_fp8(teacher, on_gpu=packing.device.type != "cpu")
    teacher.requires_grad_(False)


def _calibration_batches(
    sequences: Sequence[Sequence[int]], packing: Packing
) -> list[FinishedBatch]:
    """Questions that make the teacher compute every layer at every token.

    A token is computed where the next one is asked for, so the last token is repeated.
    """
    states = [
        State(
            sample=number,
            prompt_ids=[*ids[:1]],
            response_ids=[*ids[1:], ids[-1]],
            masked=[True] * len(ids),
            counted=[True] * len(ids),
            trained_tokens=0,
        )
        for number, ids in enumerate(sequences)
    ]
    return pack_step([states], packing).finished
