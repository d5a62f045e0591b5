"""Independent computations that tests compare against: Hugging Face's models with materialised
masks, in plain PyTorch.

Nothing here imports the project's training or rollout code.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(hf_dir: Path) -> PreTrainedModel:
    """The model as transformers runs it, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    # transformers keeps gradients from the pad token's row, but the id is also an end token.
    model.get_input_embeddings().padding_idx = None
    return model


def add_low_rank(
    model: PreTrainedModel, terms: Mapping[tuple[int, str, str], Tensor], scale: float
) -> None:
    """Add scale * B A x to the linears of a model whose own weights are frozen then. ``terms`` are
    the factors "a" and "b" of (layer, Megatron's linear): linear_qkv's rows are [queries; key;
    value] of each group, linear_fc1's are [gate; up].
    """
    model.requires_grad_(False)
    c = model.config
    for layer, target in sorted({key[:2] for key in terms}):
        a, b = terms[layer, target, "a"], terms[layer, target, "b"]
        block = model.model.layers[layer]
        if target == "linear_qkv":
            groups = b.unflatten(0, (c.num_key_value_heads, -1, c.head_dim))
            for name, part in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
                linear = getattr(block.self_attn, f"{name}_proj")
                _add_term(linear, a, part.reshape(-1, b.shape[1]), scale)
        elif target == "linear_fc1":
            _add_term(block.mlp.gate_proj, a, b[: c.intermediate_size], scale)
            _add_term(block.mlp.up_proj, a, b[c.intermediate_size :], scale)
        else:
            linears = {"linear_proj": block.self_attn.o_proj, "linear_fc2": block.mlp.down_proj}
            _add_term(linears[target], a, b, scale)


def _add_term(linear: torch.nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
    linear.register_forward_hook(lambda _, x, y: y + scale * (x[0] @ a.t() @ b.t()))


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
    possible = p > -torch.inf
    if kind == "forward_kl":
        return torch.where(possible, p.exp() * (p - q), 0.0).sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    if kind == "mixed":
        return (1 - reverse_weight) * divergence("forward_kl", p, q) + reverse_weight * divergence(
            "reverse_kl", p, q
        )
    assert kind == "jsd"
    m = torch.logaddexp(p + math.log(alpha), q + math.log(1 - alpha))
    to_m = torch.where(possible, p.exp() * (p - m), 0.0)
    return alpha * to_m.sum(-1) + (1 - alpha) * (q.exp() * (q - m)).sum(-1)


def nucleus(log_p: Tensor, top_p: float) -> list[int]:
    """Ids of the smallest set of largest probabilities [V] that holds ``top_p``, largest first."""
    order = sorted(range(len(log_p)), key=lambda v: (-log_p[v].item(), v))
    mass = log_p.exp()[order].cumsum(-1).tolist()
    return order if top_p == 1 else order[: 1 + sum(before < top_p for before in mass[:-1])]


def distillation(
    kind: str,
    teacher_logits: Tensor,
    log_q: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    tail: str = "drop",
    **options: float,
) -> Tensor:
    """A divergence [M] from the reshaped teacher, over its k largest entries; logits and student's
    log-probabilities [M, V]. Row by row, by sorting, over lists of the events that count.
    """
    values = []
    for logits, q in zip(teacher_logits, log_q, strict=True):
        p = (logits / temperature).log_softmax(-1)
        likeliest = nucleus(p, top_p)
        if top_p < 1:
            inside = torch.zeros_like(p, dtype=torch.bool)
            inside[likeliest] = True
            p = torch.where(inside, p - p[likeliest].logsumexp(-1), -torch.inf)
        chosen = likeliest[:top_k] if top_k else list(range(len(p)))
        rest = [v for v in range(len(p)) if v not in chosen]
        p_events, q_events = p[chosen], q[chosen]
        if tail == "renormalise":
            p_events, q_events = p_events.log_softmax(-1), q_events.log_softmax(-1)
        if tail == "bucket" and rest:
            p_events = torch.cat([p_events, p[rest].logsumexp(-1, keepdim=True)])
            q_events = torch.cat([q_events, q[rest].logsumexp(-1, keepdim=True)])
        values.append(divergence(kind, p_events, q_events, **options))
    return torch.stack(values) if values else log_q.sum(-1)


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
    **options: Any,
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
            asked = causal_logits(teacher, [*prompt, *response])[len(prompt) - 1 : -1]
        positions = counted_positions(response, masked, end_ids, exclude_eos=exclude_eos)
        if not positions:
            losses.append(q.sum() * 0)
        elif kind == "nll":
            losses.append(F.nll_loss(q[positions], torch.tensor(response)[positions]))
        else:
            losses.append(distillation(kind, asked[positions], q[positions], **options).mean())
    return losses


def gradient_norm(model: PreTrainedModel) -> float:
    """L2 norm over all parameters; tied ones are one parameter in transformers."""
    return (
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradient of every parameter by its name in a safetensors file; then forgotten."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return apart(found)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 keeps a layer's experts in one tensor; files have one for each."""
    files: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not prefix.endswith("experts"):
            files[name] = tensor
            continue
        for expert, own in enumerate(tensor):
            if kind == "down_proj":
                files[f"{prefix}.{expert}.down_proj.weight"] = own
            else:
                gate, up = own.chunk(2)
                files[f"{prefix}.{expert}.gate_proj.weight"] = gate
                files[f"{prefix}.{expert}.up_proj.weight"] = up
    return files


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How ``decode`` decodes; the words of DESIGN 4b."""

    block_size: int
    steps: int
    remasking: str
    mask_id: int
    end_ids: Sequence[int]
    forbidden: Sequence[int] = ()
    threshold: float = 0.9
    entropy_bound: float = 0.35
    logit_shift: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    # (position, pass from 0) -> number in [0, 1)
    uniform: Callable[[int, int], float] = field(default=lambda position, pass_index: 0.0)


@dataclass(frozen=True)
class Decoded:
    """A response of whole blocks, with the 1-based pass that committed each token, and its
    confidence then.
    """

    response_ids: list[int]
    committed_at: list[int]
    confidence: list[float]
    margins: list[float]
    passes: int


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: Sequence[int], limit: int, rules: Rules) -> Decoded:
    """Block diffusion without any cache: every pass runs the model on the whole sequence so far."""
    tokens, size = list(prompt), rules.block_size
    committed_at: dict[int, int] = {}
    confidence: dict[int, float] = {}
    margins: dict[int, float] = {}
    passes = 0
    for start in itertools.count(len(prompt) // size * size, size):
        stop = start + size
        masked = list(range(max(start, len(prompt)), stop))
        tokens += [rules.mask_id] * len(masked)
        for pass_index in itertools.count():
            logits = _block_logits(model, tokens, start, rules)
            drawn = {
                i: draw(logits[i - start], rules, rules.uniform(i, pass_index)) for i in masked
            }
            for i in committed(drawn, pass_index, rules):
                tokens[i] = drawn[i].token
                committed_at[i] = pass_index + 1
                confidence[i] = drawn[i].confidence
                margins[i] = drawn[i].margin
                masked.remove(i)
            passes += 1
            if not masked:
                break
        response = tokens[max(start, len(prompt)) :]
        if set(response) & set(rules.end_ids) or stop >= len(prompt) + limit:
            positions = range(len(prompt), len(tokens))
            return Decoded(
                tokens[len(prompt) :],
                [committed_at[i] for i in positions],
                [confidence[i] for i in positions],
                [margins[i] for i in positions],
                passes,
            )
    raise AssertionError


def _block_logits(
    model: PreTrainedModel, tokens: Sequence[int], start: int, rules: Rules
) -> Tensor:
    """Logits [B, V] from which the last block's tokens are drawn, forbidden ids at -inf."""
    block = torch.arange(len(tokens)) // rules.block_size
    visible = block[None, :] <= block[:, None]
    logits = masked_logits(model, tokens, range(len(tokens)), visible)
    if rules.logit_shift:  # the row before a block belongs to a clean block and sees nothing later
        logits = torch.cat([logits[:1], logits[:-1]])
    logits = logits[start:].clone()
    logits[:, list(rules.forbidden)] = -torch.inf
    return logits


@dataclass(frozen=True)
class Drawn:
    """One drawn token."""

    token: int
    confidence: float  # its probability before temperature, top-k and top-p
    entropy: float  # nats, before them too
    margin: float = 0.0  # the best logit less the second best


def draw(logits: Tensor, rules: Rules, uniform: float) -> Drawn:
    """One token from logits [V], in float64 and by sorting."""
    plain = logits.double().softmax(-1).tolist()
    second, first = sorted(logits.double().tolist())[-2:]
    entropy = -sum(p * torch.log(torch.tensor(p, dtype=torch.float64)).item() for p in plain if p)
    if rules.temperature == 0:
        token = plain.index(max(plain))
        return Drawn(token, plain[token], entropy, first - second)
    shaped = (logits.double() / rules.temperature).softmax(-1).tolist()
    order = sorted(range(len(shaped)), key=lambda v: (-shaped[v], v))
    if rules.top_k:
        order = order[: rules.top_k]
    needed = rules.top_p * sum(shaped[v] for v in order)
    kept: list[int] = []
    for v in order:
        if rules.top_p < 1 and sum(shaped[k] for k in kept) >= needed:
            break
        kept.append(v)
    target, running = uniform * sum(shaped[v] for v in kept), 0.0
    for v in sorted(v for v in kept if shaped[v] > 0):
        running += shaped[v]
        if running > target:
            return Drawn(v, plain[v], entropy, first - second)
    raise AssertionError


def committed(drawn: dict[int, Drawn], pass_index: int, rules: Rules) -> list[int]:
    """Which of the still masked positions this pass commits."""
    size, steps = rules.block_size, rules.steps
    quota = size // steps + (pass_index < size % steps) if pass_index < steps else len(drawn)
    if rules.remasking == "sequential":
        return sorted(drawn)[:quota]
    if rules.remasking == "entropy_bounded":
        order = sorted(drawn, key=lambda i: (drawn[i].entropy, i))
        sums = list(itertools.accumulate(drawn[i].entropy for i in order))
        within = [i for i, total in zip(order, sums, strict=True) if total < rules.entropy_bound]
        return order if pass_index >= steps else within or order[:1]
    best = sorted(drawn, key=lambda i: (-drawn[i].confidence, i))[:quota]
    if rules.remasking == "low_confidence_static":
        return best
    assert rules.remasking == "low_confidence_dynamic"
    return sorted({*best, *(i for i in drawn if drawn[i].confidence > rules.threshold)})
