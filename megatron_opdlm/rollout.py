"""Rollout engine: the student module itself generates, block by block, over the slots of one KV
cache.

Every forward takes, for each active slot, the *window* of tokens that are not final in the cache
yet: [finished block | fresh block] in the first pass of a block, [fresh block] in the others,
[whole prompt | fresh block] right after admission. So a block costs T forwards: committing it
shares a forward with the next block's first pass, and so does prefill. Sequences enter and leave as
they finish. Autoregressive decoding is the case B = 1 with shifted logits.

All ranks of a model replica hold the same bookkeeping on the host; only drawn tokens travel, from
the last pipeline stage.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.diffusion import denoising, randomness
from megatron_opdlm.diffusion.blocks import first_block_start, sequence_end
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from megatron_opdlm.model.attention import cached_plan
from megatron_opdlm.model.flops import attended_pairs, forward_flops
from megatron_opdlm.model.kv_cache import KVCache
from megatron_opdlm.model.qwen3 import Qwen3, without_sequence_parallel
from megatron_opdlm.model.vocab_parallel import project
from megatron_opdlm.records import Prompt, Trajectory, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to generate."""

    sample: int  # key of its random numbers
    prompt: Prompt
    max_new_tokens: int  # response tokens that the user gets at most


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What a call of ``generate`` made and what it cost."""

    trajectories: list[Trajectory]
    flops: float  # of the whole model replica


@torch.inference_mode()
def generate(
    model: Qwen3,
    requests: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary,
    *,
    key: tuple[int, int],
    slots: int = 128,
) -> Rollout:
    """Generate this model replica's requests; trajectories are in their order and the same on all
    its ranks.

    ``key`` = (seed, step): with the sample's number it decides every random draw, so a response
    depends neither on its batch nor on the layout. Raises InputError for an empty prompt where
    logits are read from the position before.
    """
    if not requests:
        return Rollout(trajectories=[], flops=0.0)
    rules = _rules(decoding)
    for request in requests:
        if rules.logit_shift and not request.prompt.ids:
            raise InputError(
                f"prompt {request.prompt.index} is empty: with mode=ar or "
                "loss.logit_shift=true its first token has no position to be predicted from; "
                "give at least one prompt token"
            )
    was_training = model.training
    model.eval()
    try:
        with without_sequence_parallel(model):
            return _Engine(model, requests, rules, vocabulary, key, min(slots, len(requests))).run()
    finally:
        model.train(was_training)


def _rules(decoding: Decoding) -> Decoding:
    """Autoregressive decoding as block diffusion: blocks of one token, one pass, logits from the
    position before.
    """
    if decoding.mode == "diffusion":
        return decoding
    return decoding.autoregressive()


class _Engine:
    """Bookkeeping of one ``generate`` call. Tensors indexed by slot live on the host; S slots, L
    cached positions, B block.
    """

    def __init__(
        self,
        model: Qwen3,
        requests: Sequence[Request],
        rules: Decoding,
        vocabulary: Vocabulary,
        key: tuple[int, int],
        slots: int,
    ) -> None:
        self.model, self.rules, self.vocabulary, self.key = model, rules, vocabulary, key
        self.requests = requests
        self.waiting = deque(range(len(requests)))
        self.finished: dict[int, Trajectory] = {}
        self.device = next(model.parameters()).device
        block = rules.block_size
        length = max(sequence_end(len(r.prompt.ids), r.max_new_tokens, block) for r in requests)
        self.cache = _allocate_cache(model, slots, length)
        self.forbidden = torch.tensor(
            vocabulary.forbidden_ids, dtype=torch.int64, device=self.device
        )
        self.end_ids = torch.tensor(vocabulary.end_ids, dtype=torch.int64)
        self.flops = 0.0
        self.carry = torch.zeros(
            slots, model.shape.hidden, dtype=model.config.params_dtype, device=self.device
        )

        self.request = torch.full((slots,), -1)  # which request a slot works on; -1: free
        self.tokens = torch.full((slots, length), vocabulary.mask_id)
        self.committed_at = torch.zeros((slots, length), dtype=torch.int64)
        self.prompt_tokens, self.end, self.sample = (
            torch.zeros(slots, dtype=torch.int64) for _ in range(3)
        )
        self.block_start, self.clean_until = (
            torch.zeros(slots, dtype=torch.int64) for _ in range(2)
        )
        self.pass_index, self.forwards, self.passes = (
            torch.zeros(slots, dtype=torch.int64) for _ in range(3)
        )

    def run(self) -> Rollout:
        """Admit, denoise and retire until every request has its trajectory."""
        while len(self.finished) < len(self.requests):
            self._admit()
            self._denoise()
            self._retire()
        return Rollout(
            trajectories=[self.finished[i] for i in range(len(self.requests))], flops=self.flops
        )

    def _admit(self) -> None:
        """Give waiting requests the free slots; their prompts ride along in the next forward."""
        for slot in torch.nonzero(self.request < 0).flatten().tolist():
            if not self.waiting:
                return
            number = self.waiting.popleft()
            request, block = self.requests[number], self.rules.block_size
            prompt = torch.tensor(request.prompt.ids, dtype=torch.int64)
            self.tokens[slot] = self.vocabulary.mask_id
            self.tokens[slot, : len(prompt)] = prompt
            self.committed_at[slot] = 0
            self.request[slot], self.sample[slot], self.prompt_tokens[slot] = (
                number,
                request.sample,
                len(prompt),
            )
            self.end[slot] = sequence_end(len(prompt), request.max_new_tokens, block)
            self.block_start[slot] = first_block_start(len(prompt), block)
            for counter in (self.clean_until, self.pass_index, self.forwards, self.passes):
                counter[slot] = 0

    def _denoise(self) -> None:
        """One forward of all active slots and the commits that follow from it."""
        active = torch.nonzero(self.request >= 0).flatten()
        block_position = self.block_start[active, None] + torch.arange(
            self.rules.block_size
        )  # [n, B]
        fresh = block_position >= self.prompt_tokens[active, None]
        masked = fresh & (self.committed_at[active[:, None], block_position] == 0)
        drawn = self._draw(active, block_position, masked)
        commit = denoising.choose_commits(
            _spread(drawn.confidence, masked),
            _spread(drawn.entropy, masked),
            masked,
            self.pass_index[active],
            steps=self.rules.denoising_steps,
            remasking=self.rules.remasking,
            threshold=self.rules.threshold,
            entropy_bound=self.rules.entropy_bound,
        )
        row, column = torch.nonzero(commit, as_tuple=True)
        slot, position = active[row], block_position[row, column]
        self.tokens[slot, position] = _spread(drawn.token, masked)[row, column]
        self.pass_index[active] += 1
        self.committed_at[slot, position] = self.pass_index[slot]
        self.forwards[active] += 1
        self.passes[active] += 1
        self.clean_until[active] = self.block_start[active]

    def _draw(self, active: Tensor, block_position: Tensor, masked: Tensor) -> denoising.Draw:
        """Draw a token at every masked position (row-major order), the same on all ranks of the
        replica.
        """
        row, column = torch.nonzero(masked, as_tuple=True)
        hidden, first_token = self._forward(active, projected_rows=len(row))
        position = block_position[row, column]
        result = torch.zeros(3, len(row), dtype=torch.float64, device=self.device)
        if hidden is not None:
            read = (
                first_token[row] + position - self.clean_until[active[row]]
            )  # index into the packed windows
            hidden_MH = self._read(hidden, read, active, row, column)
            logits = project(hidden_MH, self.model.head_weight, self.model.shard, self.forbidden)
            seed, step = self.key
            uniform = randomness.uniform(
                seed,
                step,
                self.sample[active[row]],
                position,
                self.pass_index[active[row]],
                randomness.DRAW_TOKEN,
            )
            drawn = denoising.draw(
                logits,
                uniform.to(self.device),
                temperature=self.rules.temperature,
                top_k=self.rules.top_k,
                top_p=self.rules.top_p,
                shard=self.model.shard,
            )
            result = torch.stack([drawn.token.double(), drawn.confidence, drawn.entropy])
        token, confidence, entropy = parallel.broadcast_from_last_stage(result).cpu()
        return denoising.Draw(token.long(), confidence, entropy)

    def _read(
        self, hidden: Tensor, read: Tensor, active: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        """Hidden states [M, H] that predict the masked positions.

        With shifted logits position i is read at i - 1; a block's first position is read from the
        last one before the block as it was last computed clean, which is in the window of the
        block's first pass and carried from then on.
        """
        if not self.rules.logit_shift:
            return hidden[read.to(self.device)]
        first_pass = self.pass_index[active] == 0
        opens = column == 0
        computed = opens & first_pass[row]
        slot = active[row].to(self.device)
        self.carry[slot[computed]] = hidden[(read - 1)[computed].to(self.device)]
        rows = hidden[(read - 1).clamp(min=0).to(self.device)]
        return torch.where(opens[:, None].to(self.device), self.carry[slot], rows)

    def _forward(self, active: Tensor, *, projected_rows: int) -> tuple[Tensor | None, Tensor]:
        """Run all windows through this rank's stage.

        Returns the final hidden states [N, H] (None on other stages than the last) and each
        window's first token's index.
        """
        start = self.clean_until[active]
        end = self.block_start[active] + (
            0 if self._fresh_block_is_not_read() else self.rules.block_size
        )
        lengths = end - start
        first_token = lengths.cumsum(0) - lengths
        slot_N = torch.repeat_interleave(active, lengths)
        position_N = torch.arange(int(lengths.sum())) - torch.repeat_interleave(
            first_token - start, lengths
        )
        tokens_N = self.tokens[slot_N, position_N].to(self.device)
        position_N = position_N.to(self.device)
        plan = cached_plan(
            lengths.tolist(),
            active.tolist(),
            position_N,
            end.tolist(),
            self.rules.block_size,
            self.cache,
        )
        self.flops += forward_flops(
            self.model.shape,
            tokens=len(position_N),
            attended_pairs=attended_pairs(plan),
            projected_rows=projected_rows,
        )
        if not parallel.is_first_stage():
            shape = (len(position_N), 1, self.model.shape.hidden)
            dtype = self.model.config.params_dtype
            self.model.set_input_tensor(
                parallel.receive_from_previous_stage(shape, dtype, self.device)
            )
        output = self.model.run(tokens_N, position_N, plan)
        if parallel.is_last_stage():
            return output.flatten(0, 1), first_token
        parallel.send_to_next_stage(output)
        return None, first_token

    def _fresh_block_is_not_read(self) -> bool:
        """With B = 1 and shifted logits the fresh token is predicted from the one before it: leave
        its mask token out.
        """
        return self.rules.logit_shift and self.rules.block_size == 1

    def _retire(self) -> None:
        """Close finished blocks: a sequence ends with an end token in its response or at its length
        limit.
        """
        block = self.rules.block_size
        active = torch.nonzero(self.request >= 0).flatten()
        position = self.block_start[active, None] + torch.arange(block)
        response = position >= self.prompt_tokens[active, None]
        open_ = (response & (self.committed_at[active[:, None], position] == 0)).any(1)
        tokens = self.tokens[active[:, None], position]
        stopped = (response & torch.isin(tokens, self.end_ids)).any(1)
        last = self.block_start[active] + block >= self.end[active]
        for slot in active[~open_ & (stopped | last)].tolist():
            number = int(self.request[slot])
            self.finished[number] = self._trajectory(slot, self.requests[number])
            self.request[slot] = -1
        going_on = active[~open_ & ~stopped & ~last]
        self.block_start[going_on] += block
        self.pass_index[going_on] = 0

    def _trajectory(self, slot: int, request: Request) -> Trajectory:
        start, stop = len(request.prompt.ids), int(self.block_start[slot]) + self.rules.block_size
        response = self.tokens[slot, start:stop].tolist()
        ends = [i for i, token in enumerate(response) if token in self.vocabulary.end_ids]
        stopped = bool(ends) and ends[0] < request.max_new_tokens
        return Trajectory(
            sample=request.sample,
            prompt=request.prompt,
            response_ids=response,
            committed_at=self.committed_at[slot, start:stop].tolist(),
            response_tokens=ends[0] + 1 if stopped else min(len(response), request.max_new_tokens),
            finish_reason="stop" if stopped else "length",
            forwards=int(self.forwards[slot]),
            passes=int(self.passes[slot]),
        )


def _spread(values_M: Tensor, masked: Tensor) -> Tensor:
    """Row-major values at the masked positions -> a tensor of the block's shape [n, B], zero
    elsewhere.
    """
    spread = torch.zeros(masked.shape, dtype=values_M.dtype)
    spread[masked] = values_M
    return spread


def _allocate_cache(model: Qwen3, slots: int, positions: int) -> KVCache:
    return KVCache(
        layer_numbers=model.layer_numbers,
        slots=slots,
        positions=positions,
        groups=model.shape.groups // model.config.tensor_model_parallel_size,
        head_dim=model.shape.head_dim,
        dtype=model.config.params_dtype,
        device=next(model.parameters()).device,
    )
