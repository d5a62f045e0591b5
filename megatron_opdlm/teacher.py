"""Frozen teacher -> targets: one plain causal forward over the finished sequences (arXiv
2606.06712, step 3).

The target at position i is the teacher's next-token distribution on the prefix before i, kept as
its final hidden state [H] instead of logits [V]. A phase of its own, once per rollout; targets are
used again by every inner epoch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.model.qwen3 import Qwen3
from megatron_opdlm.model.vocab_parallel import select_positions
from megatron_opdlm.parallel import Sending
from megatron_opdlm.states import PackedBatch


@torch.inference_mode()
def score(teacher: Qwen3, batches: Sequence[PackedBatch]) -> list[Tensor | None]:
    """Targets of each microbatch: hidden states [M, H] on the last pipeline stage, None on the
    others.

    Stages work on different microbatches at the same time: each receives, computes and sends in
    turn.
    """
    outputs = [_score(teacher, batch) for batch in batches]
    for output in outputs:
        if isinstance(output, Sending):
            output.wait()
    return [None if isinstance(output, Sending) else output for output in outputs]


def _score(teacher: Qwen3, batch: PackedBatch) -> Tensor | Sending:
    config = teacher.config
    if not parallel.is_first_stage():
        rows = len(batch.teacher_tokens) // (
            config.tensor_model_parallel_size if config.sequence_parallel else 1
        )
        device = batch.teacher_tokens.device
        shape = (rows, 1, config.hidden_size)
        teacher.set_input_tensor(
            parallel.receive_from_previous_stage(shape, config.params_dtype, device)
        )
    output = teacher.run(batch.teacher_tokens, batch.teacher_positions, batch.teacher_plan)
    if parallel.is_last_stage():
        return select_positions(
            output, batch.teacher_read, sequence_parallel=config.sequence_parallel
        )
    return parallel.send_to_next_stage(output)
