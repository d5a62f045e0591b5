"""Frozen teacher -> targets: one plain causal forward over the finished sequences (arXiv
2606.06712, step 3).

The target at position i is the teacher's next-token distribution on the prefix before i, kept as
its final hidden state [H] instead of logits [V]. A phase of its own, once per rollout: a
sequence is asked about once, and all its states and inner epochs use the answer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.lora import base_only
from megatron_opdlm.model.vocab_parallel import select_positions
from megatron_opdlm.packing.finished import FinishedBatch
from megatron_opdlm.parallel import Sending
from megatron_opdlm.supervision import activity
from megatron_opdlm.top_k_targets import TopK

# As hidden states [K, H], or as the largest entries of the distributions.
Targets = Tensor | TopK
Keep = Callable[[Tensor], Targets]


@torch.inference_mode()
def score(
    teacher: LanguageModel,
    batches: Sequence[FinishedBatch],
    *,
    offload: bool = False,
    keep: Keep | None = None,
) -> Targets | None:
    """Wanted targets of all batches, one after the other: hidden states [K, H] on the last pipeline
    stage, or what ``keep`` makes of a batch's; None on the other stages. ``offload`` keeps them in
    host memory.

    Stages work on different batches at the same time: each receives, computes and sends in turn. A
    student that stands in for its base is asked without its low-rank terms.
    """
    with base_only(teacher):
        return _score_all(teacher, batches, offload, keep or (lambda hidden: hidden))


def _score_all(
    teacher: LanguageModel, batches: Sequence[FinishedBatch], offload: bool, keep: Keep
) -> Targets | None:
    stored: list[Tensor] = []
    first, sending = 0, []
    answer: Targets | None = None
    for batch in batches:
        activity.advance()
        output = _score(teacher, batch)
        if isinstance(output, Sending):
            sending.append(output)
            continue
        answer = keep(output)
        parts = answer if isinstance(answer, TopK) else (answer,)
        if not stored:  # filled piece by piece: no second copy of all of them
            rows = sum(len(one.wanted) for one in batches)
            stored = [
                x.new_empty((rows, *x.shape[1:]), device="cpu" if offload else x.device)
                for x in parts
            ]
        for target, part in zip(stored, parts, strict=True):
            target[first : first + len(part)] = part
        first += len(output)
    for output in sending:
        output.wait()
    if answer is None:
        return None
    return TopK(*stored) if isinstance(answer, TopK) else stored[0]


def rows_of(targets: Targets, index_M: Tensor) -> Targets:
    """M rows of the step's targets, on the device of the index."""
    if isinstance(targets, TopK):
        return targets.select(index_M)
    return targets.index_select(0, index_M.to(targets.device)).to(index_M.device)


def _score(teacher: LanguageModel, batch: FinishedBatch) -> Tensor | Sending:
    config = teacher.config
    if not parallel.is_first_stage():
        rows = len(batch.tokens) // (
            config.tensor_model_parallel_size if config.sequence_parallel else 1
        )
        device = batch.tokens.device
        shape = (rows, 1, config.hidden_size)
        teacher.set_input_tensor(
            parallel.receive_from_previous_stage(shape, config.params_dtype, device)
        )
    output = teacher.run(batch.tokens, batch.positions, batch.plan)
    if parallel.is_last_stage():
        own = select_positions(output, batch.read, sequence_parallel=config.sequence_parallel)
        return parallel.gather_rows_over_context(own, batch.most).index_select(0, batch.wanted)
    return parallel.send_to_next_stage(output)
