"""A straightforward distillation update: what the training step is measured against.

It does what one writes first, and what the paper's public code does: transformers' Qwen3 on rows
[prompt | clean response | noisy response] padded to the longest of the batch, one row at a time;
a dense mask over the whole row; full float32 logits at every position of student and teacher; the
teacher on the doubled row, too, its noisy half filled with the finished tokens; the KL by autograd.
Same states, same loss and same gradients as ours (a test holds it).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.records import State


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Padded rows; b sequences, X = L0 + L1 + (B - 1) + L1 positions, L0 and L1 the longest prompt
    and response. The B - 1 positions before the noisy copy repeat the prompt's unfinished block.
    """

    noisy_bX: Tensor  # input of the student
    finished_bX: Tensor  # the same without masks: input of the teacher
    position_bX: Tensor  # 0 in padding
    real_bX: Tensor  # bool, False in padding
    counted_bR: Tensor  # bool [b, L1], under loss
    prompt: int  # L0
    response: int  # L1


class PaddedUpdate:
    """A student with its optimizer, and its frozen teacher."""

    def __init__(
        self,
        shape: ModelShape,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        *,
        block_size: int,
        mask_id: int,
        lr: float,
        clip_grad: float,
    ) -> None:
        """``student`` and ``teacher`` are weights under Hugging Face names."""
        self.block_size, self.mask_id, self.clip_grad = block_size, mask_id, clip_grad
        self.student = _model(shape, student)
        self.teacher = _model(shape, teacher).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=lr, weight_decay=0.0)

    def update(self, states: Sequence[State]) -> tuple[float, float]:
        """One optimizer step on the states -> (mean loss over sequences, gradient norm)."""
        self.optimizer.zero_grad()
        loss = self.accumulate(states)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_grad)
        self.optimizer.step()
        return loss, float(norm)

    def accumulate(self, states: Sequence[State]) -> float:
        """Add the gradients of the mean loss, row by row; returns that loss."""
        rows = self._pad(states)
        total = 0.0
        for number in range(len(states)):
            loss = self._row_loss(rows, slice(number, number + 1)) / len(states)
            loss.backward()
            total += loss.item()
        return total

    def _row_loss(self, rows: _Rows, chosen: slice) -> Tensor:
        """Mean over the counted positions of KL(teacher || student), 0 without any."""
        visible = self._visible(rows, chosen)
        logits = self._logits(self.student, rows, rows.noisy_bX, visible, chosen)
        with torch.no_grad():
            # Causal within each copy; all of the clean one lies before the noisy one.
            causal = visible.tril()
            asked = self._logits(self.teacher, rows, rows.finished_bX, causal, chosen)
        first = asked.shape[1] - rows.response
        log_q = logits[:, first:].log_softmax(-1)
        # The token after the prompt is predicted at the prompt's end, the others in the noisy half.
        before = torch.cat([asked[:, rows.prompt - 1 : rows.prompt], asked[:, first:-1]], dim=1)
        log_p = before.log_softmax(-1)
        kl_bR = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        counted = rows.counted_bR[chosen]
        return (kl_bR * counted).sum() / counted.sum().clamp(min=1)

    def _logits(
        self, model: PreTrainedModel, rows: _Rows, tokens: Tensor, visible: Tensor, chosen: slice
    ) -> Tensor:
        bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
        return model(
            input_ids=tokens[chosen],
            position_ids=rows.position_bX[chosen],
            attention_mask=bias,
            use_cache=False,
        ).logits

    def _visible(self, rows: _Rows, chosen: slice) -> Tensor:
        """bool [b, X, X]: the block-diffusion mask without padding; padding sees itself."""
        block = rows.position_bX[chosen] // self.block_size
        clean = torch.arange(block.shape[1]) < rows.prompt + rows.response
        earlier = block[:, None, :] < block[:, :, None]
        same = block[:, None, :] == block[:, :, None]
        of_clean = clean[None, None, :] & (earlier | (clean[None, :, None] & same))
        of_noisy = ~clean[None, None, :] & ~clean[None, :, None] & same
        real = rows.real_bX[chosen]
        inside = (of_clean | of_noisy) & real[:, None, :] & real[:, :, None]
        return inside | torch.eye(block.shape[1], dtype=torch.bool)

    def _pad(self, states: Sequence[State]) -> _Rows:
        prompt = max(len(state.prompt_ids) for state in states)
        response = max(len(state.response_ids) for state in states)
        tail = self.block_size - 1
        size = (len(states), prompt + 2 * response + tail)
        noisy, finished, position = (torch.zeros(size, dtype=torch.int64) for _ in range(3))
        real = torch.zeros(size, dtype=torch.bool)
        counted = torch.zeros(len(states), response, dtype=torch.bool)
        for b, state in enumerate(states):
            p, r = len(state.prompt_ids), len(state.response_ids)
            unfinished = p % self.block_size
            second = prompt + response + tail  # where the noisy response starts
            clean = slice(prompt - p, prompt + r)
            copy = slice(second - unfinished, second + r)
            whole = torch.tensor(state.prompt_ids + state.response_ids)
            masks = torch.tensor([False] * p + list(state.masked))
            for place, first in ((clean, 0), (copy, p - unfinished)):
                finished[b, place] = noisy[b, place] = whole[first:]
                position[b, place] = torch.arange(first, p + r)
                real[b, place] = True
            noisy[b, copy] = torch.where(masks, self.mask_id, whole)[p - unfinished :]
            counted[b, :r] = torch.tensor(state.counted)
        return _Rows(
            noisy_bX=noisy,
            finished_bX=finished,
            position_bX=position,
            real_bX=real,
            counted_bR=counted,
            prompt=prompt,
            response=response,
        )


def _model(shape: ModelShape, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    config = Qwen3Config.from_dict(
        {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups,
            "head_dim": shape.head_dim,
            "max_position_embeddings": shape.max_positions,
            "rope_theta": shape.rope_theta,
            "rms_norm_eps": shape.rms_eps,
            "tie_word_embeddings": shape.tied,
        }
    )
    model = Qwen3ForCausalLM(config)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= ({"lm_head.weight"} if shape.tied else set()), missing
    return model
