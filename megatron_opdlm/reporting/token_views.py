"""What a step's update saw at single tokens of a few samples: the divergence, and what the teacher
would have written there. For people, beside the step: nothing is trained on it.

Only at the positions under loss of the state that was trained. Where several states of a sample
have a position, it is seen in the one that is nearest to finished.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.diffusion.wide_product import wide_product
from megatron_opdlm.divergence import target
from megatron_opdlm.packing.student import PackedBatch
from megatron_opdlm.records import TokenView, UpdateReport
from megatron_opdlm.teacher import Targets, rows_of
from megatron_opdlm.top_k_targets import TopK
from megatron_opdlm.update import Objective

ALTERNATIVES = 3  # of the teacher


def view_tokens(
    samples: Collection[int],
    updates: Sequence[Sequence[PackedBatch]],
    reports: Sequence[UpdateReport],
    targets: Targets | None,
    objective: Objective,
) -> dict[int, dict[int, TokenView]]:
    """Sample -> position in its response -> what was seen; all ranks together, the same on every
    one that is in rank 0's place of its pipeline. ``reports`` are of ``updates``, in their order.
    """
    views: list[TokenView] = []
    for batches, report in zip(updates, reports, strict=False):  # of the first inner epoch
        first = 0
        for batch in batches:
            values = report.position_value[first : first + len(batch.labels)]
            first += len(batch.labels)
            views += _view(samples, batch, values, targets, objective)
    found: dict[int, dict[int, TokenView]] = {}
    for view in parallel.gather_objects_over_generators(views):
        known = found.setdefault(view.sample, {})
        if view.position not in known or view.masked < known[view.position].masked:
            known[view.position] = view
    return found


def _view(
    samples: Collection[int],
    batch: PackedBatch,
    values: Sequence[float],
    targets: Targets | None,
    objective: Objective,
) -> list[TokenView]:
    wanted = [s.sample in samples and not s.off_policy for s in batch.states]
    if not any(wanted):
        return []
    chosen = torch.tensor(wanted, device=batch.sequence.device)[batch.sequence]
    rows = torch.nonzero(chosen).flatten()
    tops = _teacher(batch.target[rows], targets, objective)
    states = [batch.states[i] for i in batch.sequence[rows].tolist()]
    return [
        TokenView(
            sample=state.sample,
            position=position,
            masked=sum(state.masked),
            value=values[row],
            teacher=top,
        )
        for row, state, position, top in zip(
            rows.tolist(), states, batch.position[rows].tolist(), tops, strict=True
        )
    ]


def _teacher(
    rows: Tensor, targets: Targets | None, objective: Objective
) -> list[list[tuple[int, float]]]:
    """The teacher's likeliest tokens at rows [m] of the targets, from the last pipeline stage."""
    if objective.teacher is None:
        return [[] for _ in range(len(rows))]
    both = torch.zeros(2, len(rows), ALTERNATIVES, dtype=torch.float64, device=rows.device)
    if targets is not None and len(rows):
        both.copy_(torch.stack(_likeliest(rows_of(targets, rows), objective)))
    ids, probabilities = parallel.broadcast_over_pipeline(both)
    return [
        [(int(token), p) for token, p in zip(*pair, strict=True) if p > 0]
        for pair in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


@torch.no_grad()
def _likeliest(found: Targets, objective: Objective) -> tuple[Tensor, Tensor]:
    """Ids and probabilities [m, ALTERNATIVES] as float64, over all shards of the vocabulary."""
    assert objective.teacher is not None
    shard = objective.teacher.shard
    if isinstance(found, TopK):
        log_p, column = found.log_p_Mk, found.column_Mk
    else:
        columns = max(0, min(shard.columns, shard.vocab_size - shard.start))
        weight = objective.teacher.head_weight.detach()[:columns].t()
        log_p, _ = target(objective.divergence, wide_product(found, weight), shard)
        column = torch.arange(columns, device=log_p.device).expand_as(log_p)
    width = min(ALTERNATIVES, log_p.shape[-1])
    values, places = log_p.double().topk(width)
    ids = column.gather(-1, places).double() + shard.start
    missing = (0, ALTERNATIVES - width)
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    values = shard.gather_rows(values)
    ids = shard.gather_rows(torch.nn.functional.pad(ids, missing))
    best = values.topk(ALTERNATIVES)
    return ids.gather(-1, best.indices), best.values.exp()
