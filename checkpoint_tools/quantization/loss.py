"""What a quantised export loses: KL(unquantised || quantised) at the masked positions of rollouts
that did not calibrate it.

Both models are read layer by layer, the quantised one from the files that were written. On every
machine it computes what FP8 units would: inputs and weights rounded to E4M3, products in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.quantization.fp8_weights import Fp8Weights, is_linear, to_fp8
from checkpoint_tools.streaming.streamed_models import streamed_megatron
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.vocab_parallel import project, select_positions
from megatron_opdlm.model.weights import named_global_parameters
from megatron_opdlm.packing.student import PackedBatch
from megatron_opdlm.reporting.progress import Progress

_ROWS = 128  # positions whose distributions are in memory at once


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """Over all masked positions of all states, each counted once; nats."""

    positions: int
    kl_mean: float
    kl_max: float
    argmax_changes: float  # share of the positions whose most probable drawable token is another

    def __str__(self) -> str:
        return (
            f"KL(unquantised || FP8) mean {self.kl_mean:.3g}, max {self.kl_max:.3g} nats, arg-max "
            f"changed at {self.argmax_changes:.2%} of {self.positions} masked positions"
        )


def fp8_model(weights: Fp8Weights) -> LanguageModel:
    """The quantised export as a GPTModel in float32, as FP8 units would compute it."""
    name = str(weights.directory)
    model = streamed_megatron(weights.shape, weights.megatron, "fp32", name)
    linears = {id(p): name for name, p in named_global_parameters(model) if is_linear(name)}
    for module in model.decoder.layers.modules():
        weight = getattr(module, "weight", None)
        if id(weight) in linears:
            module.register_forward_pre_hook(_rounding(weights.input_scale(linears[id(weight)])))
    return model


def _rounding(scale: Tensor) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def rounded(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        own = scale.to(x.device)
        return (to_fp8(x, own).to(x.dtype) * own, *others)

    return rounded


@torch.inference_mode()
def measure(
    plain: LanguageModel,
    quantized: LanguageModel,
    batches: Sequence[PackedBatch],
    forbidden_ids: Sequence[int],
    progress: Progress,
) -> QuantizationLoss:
    """Compare two models at what ``batches`` read; distributions are over the whole vocabulary."""
    kl, changed = [], []
    forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long)
    for batch in batches:
        progress.advance()
        if not len(batch.student_read):
            continue
        hidden = [_hidden(model, batch) for model in (plain, quantized)]
        for rows in zip(*(h.split(_ROWS) for h in hidden), strict=True):
            log_p, log_q = (
                _log_probabilities(model, h)
                for model, h in zip((plain, quantized), rows, strict=True)
            )
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
            drawable = [x.index_fill(1, forbidden.to(x.device), -torch.inf) for x in (log_p, log_q)]
            first, second = (x.argmax(-1) for x in drawable)
            changed.append((first != second).cpu())
    values, changes = torch.cat(kl), torch.cat(changed)
    return QuantizationLoss(
        positions=len(values),
        kl_mean=float(values.mean()),
        kl_max=float(values.max()),
        argmax_changes=float(changes.double().mean()),
    )


def _hidden(model: LanguageModel, batch: PackedBatch) -> Tensor:
    """[M, H]"""
    output = model.run(batch.student_tokens, batch.student_positions, batch.student_plan)
    return select_positions(output, batch.student_read, sequence_parallel=False)


def _log_probabilities(model: LanguageModel, hidden: Tensor) -> Tensor:
    """[rows, V], float64"""
    logits = project(hidden, model.head_weight, model.shard)[:, : model.shape.vocab_size]
    return logits.double().log_softmax(-1)
