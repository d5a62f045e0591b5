"""Host bookkeeping of sequences being decoded: who sits in which slot, what is known of its block.

Knows no model. Tensors are indexed by slot; S slots, B tokens per block, n active slots of a group.
All ranks of a model replica keep the same table.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opdlm.diffusion import denoising
from megatron_opdlm.diffusion.blocks import first_block_start, sequence_end
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.planning import balance
from megatron_opdlm.records import Prompt, Trajectory, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to generate."""

    sample: int  # key of its random numbers
    prompt: Prompt
    max_new_tokens: int  # response tokens that the user gets at most

    def positions(self, block_size: int) -> int:
        """Cache positions that it can come to occupy."""
        return sequence_end(len(self.prompt.ids), self.max_new_tokens, block_size)


def split_over_replicas(
    requests: Sequence[Request], replicas: int, rules: Decoding
) -> list[list[int]]:
    """Which requests each model replica generates (indices, rising), so that all finish at about
    the same time.

    Balanced are the tokens that run through the model at most: the prompt once, a block once per
    pass and once to commit it. Fixed by the requests alone, never by who is faster: with the shares
    the rounding of logits would change, and a resumed run would not repeat the one that was killed.
    """
    runs = 1 + min(rules.denoising_steps, rules.block_size)
    tokens = [len(r.prompt.ids) + runs * r.max_new_tokens for r in requests]
    return balance.share_out(tokens, replicas)


class Windows(NamedTuple):
    """Tokens of each active slot that are not final in the cache, packed one after the other."""

    tokens_N: Tensor
    position_N: Tensor
    lengths: Tensor  # [n]
    first: Tensor  # [n] packed index of each window's first token
    start: Tensor  # [n] its absolute position
    end: Tensor  # [n] cached positions after this forward


class Masked(NamedTuple):
    """The current blocks of the active slots; M masked positions in row-major order."""

    active: Tensor  # [n] slots
    block: Tensor  # [n, B] absolute positions
    mask: Tensor  # bool [n, B]
    row: Tensor  # [M] index into ``active``
    column: Tensor  # [M]
    position: Tensor  # [M]


class SlotTable:
    """Admits requests, hands out windows, records commits and retires finished sequences."""

    def __init__(
        self,
        requests: Sequence[Request],
        rules: Decoding,
        vocabulary: Vocabulary,
        slots: int,
        positions: int,
        prefill_tokens: int,
    ) -> None:
        self.rules, self.vocabulary, self.requests = rules, vocabulary, requests
        self.prefill_tokens = prefill_tokens
        # The longest possible ones first, so that no slot is left alone with a long one at the end.
        by_length = sorted(
            range(len(requests)), key=lambda i: -requests[i].positions(rules.block_size)
        )
        self.waiting = deque(by_length)
        self.finished: dict[int, Trajectory] = {}
        self.end_ids = torch.tensor(vocabulary.end_ids, dtype=torch.int64)
        self.request = torch.full((slots,), -1)  # which request a slot works on; -1: free
        self.tokens = torch.full((slots, positions), vocabulary.mask_id)
        self.committed_at = torch.zeros((slots, positions), dtype=torch.int64)
        names = ("prompt_tokens", "end", "sample", "block_start", "clean_until")
        self.prompt_tokens, self.end, self.sample, self.block_start, self.clean_until = (
            torch.zeros(slots, dtype=torch.int64) for _ in names
        )
        # Passes over the current block, and counts over the whole sequence.
        self.pass_index, self.forwards, self.passes = torch.zeros((3, slots), dtype=torch.int64)

    @property
    def done(self) -> bool:
        """Every request has its trajectory."""
        return len(self.finished) == len(self.requests)

    def admit(self, group: Tensor) -> None:
        """Give waiting requests the group's free slots; prompts ride along in the next forward.

        Prompts of at most ``prefill_tokens`` together, or one that is longer: a forward must not
        take the memory of all prompts at once, nor keep the running sequences waiting for them.
        """
        room = self.prefill_tokens
        for slot in group[self.request[group] < 0].tolist():
            if not self.waiting:
                return
            tokens = len(self.requests[self.waiting[0]].prompt.ids)
            if tokens > room and room < self.prefill_tokens:
                return
            room -= tokens
            number = self.waiting.popleft()
            request, block = self.requests[number], self.rules.block_size
            prompt = torch.tensor(request.prompt.ids, dtype=torch.int64)
            self.tokens[slot] = self.vocabulary.mask_id
            self.tokens[slot, : len(prompt)] = prompt
            self.committed_at[slot] = 0
            self.request[slot] = number
            self.sample[slot] = request.sample
            self.prompt_tokens[slot] = len(prompt)
            self.end[slot] = request.positions(block)
            self.block_start[slot] = first_block_start(len(prompt), block)
            for counter in (self.clean_until, self.pass_index, self.forwards, self.passes):
                counter[slot] = 0

    def active(self, group: Tensor) -> Tensor:
        """The group's slots that hold a sequence, rising."""
        return group[self.request[group] >= 0]

    def windows(self, active: Tensor) -> Windows:
        """What the next forward must see: everything that is not final in the cache yet."""
        start = self.clean_until[active]
        # With B = 1 and shifted logits the fresh token is predicted from the one before it, so its
        # mask token is left out.
        unread = self.rules.logit_shift and self.rules.block_size == 1
        end = self.block_start[active] + (0 if unread else self.rules.block_size)
        lengths = end - start
        first = lengths.cumsum(0) - lengths
        slot_N = torch.repeat_interleave(active, lengths)
        offset_N = torch.repeat_interleave(start - first, lengths)
        position_N = torch.arange(len(slot_N)) + offset_N
        tokens_N = self.tokens[slot_N, position_N]
        return Windows(tokens_N, position_N, lengths, first, start, end)

    def masked(self, active: Tensor) -> Masked:
        """Where tokens are to be drawn in this pass."""
        block = self.block_start[active, None] + torch.arange(self.rules.block_size)
        fresh = block >= self.prompt_tokens[active, None]
        mask = fresh & (self.committed_at[active[:, None], block] == 0)
        row, column = torch.nonzero(mask, as_tuple=True)
        return Masked(active, block, mask, row, column, block[row, column])

    def commit(self, masked: Masked, drawn: denoising.Draw) -> None:
        """Choose by the remasking rule which drawn tokens stay, and record when."""
        active = masked.active
        chosen = denoising.choose_commits(
            _spread(drawn.confidence, masked.mask),
            _spread(drawn.entropy, masked.mask),
            masked.mask,
            self.pass_index[active],
            steps=self.rules.denoising_steps,
            remasking=self.rules.remasking,
            threshold=self.rules.threshold,
            entropy_bound=self.rules.entropy_bound,
        )
        kept = chosen[masked.row, masked.column]
        slot, position = active[masked.row[kept]], masked.position[kept]
        self.tokens[slot, position] = drawn.token[kept]
        for counter in (self.pass_index, self.forwards, self.passes):
            counter[active] += 1
        self.committed_at[slot, position] = self.pass_index[slot]
        self.clean_until[active] = self.block_start[active]

    def retire(self, group: Tensor) -> list[Trajectory]:
        """Close finished blocks: a sequence ends with an end token in its response, or at its
        length limit; the others go on to their next block. Returns those that ended.
        """
        block, active = self.rules.block_size, self.active(group)
        position = self.block_start[active, None] + torch.arange(block)
        response = position >= self.prompt_tokens[active, None]
        open_ = (response & (self.committed_at[active[:, None], position] == 0)).any(1)
        ends = torch.isin(self.tokens[active[:, None], position], self.end_ids)
        stopped = (response & ends).any(1)
        last = self.block_start[active] + block >= self.end[active]
        ended = []
        for slot in active[~open_ & (stopped | last)].tolist():
            number = int(self.request[slot])
            self.finished[number] = self._trajectory(slot, self.requests[number])
            self.request[slot] = -1
            ended.append(self.finished[number])
        going_on = active[~open_ & ~stopped & ~last]
        self.block_start[going_on] += block
        self.pass_index[going_on] = 0
        return ended

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


def _spread(values_M: Tensor, mask: Tensor) -> Tensor:
    """Row-major values at the masked positions -> the block's shape [n, B], zero elsewhere."""
    spread = torch.zeros(mask.shape, dtype=values_M.dtype)
    spread[mask] = values_M
    return spread
