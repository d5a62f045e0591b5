"""Independent computations that tests compare against: Hugging Face Qwen3 with materialised masks,
in plain PyTorch.

Nothing here imports the project's training or rollout code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def causal_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Next-token logits [len(ids), V] of an autoregressive model."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


def masked_logits(
    model: PreTrainedModel, ids: Sequence[int], positions: Sequence[int], visible: Tensor
) -> Tensor:
    """Logits [n, V] with explicit positions and an explicit mask [n, n] (True = may attend)."""
    bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    return model(
        input_ids=torch.tensor([list(ids)]),
        position_ids=torch.tensor([list(positions)]),
        attention_mask=bias,
    ).logits[0]


def student_logits(
    model: PreTrainedModel,
    prompt: Sequence[int],
    response: Sequence[int],
    masked: Sequence[int],
    *,
    block_size: int,
    mask_id: int,
    logit_shift: bool = False,
) -> Tensor:
    """Logits [R, V] for every response token of a partially denoised response, block by block.

    Each block is computed by itself: all earlier blocks clean, the block as the state shows it,
    nothing after it. That is what a sampler without a cache would compute, and it needs no second
    stream.
    """
    finished = [*prompt, *response]
    noisy = [*prompt, *(mask_id if m else t for t, m in zip(response, masked, strict=True))]
    rows = []
    for start in range(len(prompt) // block_size * block_size, len(finished), block_size):
        stop = min(start + block_size, len(finished))
        ids = finished[:start] + noisy[start:stop]
        block = torch.arange(stop) // block_size
        logits = masked_logits(model, ids, range(stop), block[None, :] <= block[:, None])
        if logit_shift:
            clean = (
                masked_logits(
                    model,
                    finished[:start],
                    range(start),
                    block[None, :start] <= block[:start, None],
                )
                if start
                else None
            )
            first = logits[:1] if clean is None else clean[-1:]
            logits = torch.cat([logits[:start], first, logits[start:-1]])
        rows.append(logits[max(start, len(prompt)) : stop])
    return torch.cat(rows)


def counted_positions(
    response: Sequence[int], masked: Sequence[int], end_ids: Sequence[int], *, exclude_eos: bool
) -> list[int]:
    """Response positions under loss: masked, not after the first end token, nor it if excluded."""
    counted = []
    for i, (token, m) in enumerate(zip(response, masked, strict=True)):
        if token in end_ids and exclude_eos:
            break
        if m:
            counted.append(i)
        if token in end_ids:
            break
    return counted


def divergence(
    kind: str, p: Tensor, q: Tensor, *, reverse_weight: float = 0.0, alpha: float = 0.5
) -> Tensor:
    """The textbook formula on log-probabilities p (teacher) and q (student) [..., V] -> [...]."""
    if kind == "forward_kl":
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    if kind == "mixed":
        return (1 - reverse_weight) * divergence("forward_kl", p, q) + reverse_weight * divergence(
            "reverse_kl", p, q
        )
    assert kind == "jsd"
    m = torch.log(alpha * p.exp() + (1 - alpha) * q.exp())
    return alpha * (p.exp() * (p - m)).sum(-1) + (1 - alpha) * (q.exp() * (q - m)).sum(-1)


def loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    *,
    block_size: int,
    mask_id: int,
    end_ids: Sequence[int],
    kind: str = "forward_kl",
    exclude_eos: bool = False,
    logit_shift: bool = False,
    **options: float,
) -> list[Tensor]:
    """Loss of each sequence (differentiable in the student): the mean over its counted positions, 0
    without any.
    """
    losses = []
    for row in rows:
        prompt, response, masked = row["prompt_ids"], row["response_ids"], row["masked"]
        q = student_logits(
            student,
            prompt,
            response,
            masked,
            block_size=block_size,
            mask_id=mask_id,
            logit_shift=logit_shift,
        ).log_softmax(-1)
        with torch.no_grad():
            p = causal_logits(teacher, [*prompt, *response])[len(prompt) - 1 : -1].log_softmax(-1)
        positions = counted_positions(response, masked, end_ids, exclude_eos=exclude_eos)
        if not positions:
            losses.append(q.sum() * 0)
        elif kind == "nll":
            losses.append(F.nll_loss(q[positions], torch.tensor(response)[positions]))
        else:
            losses.append(divergence(kind, p[positions], q[positions], **options).mean())
    return losses


def gradient_norm(model: PreTrainedModel) -> float:
    """L2 norm over all parameters; tied ones are one parameter in transformers."""
    return (
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    )
