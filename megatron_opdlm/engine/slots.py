"""The host's books of sequences being decoded: which request sits in which slot, on which pages of
the cache, and what is known of its response.

Knows no model and no device; ``slot_state.py`` is the device's side, whose reports are entered
here. S slots of a group, B tokens per block. All ranks of a model replica keep the same books.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.blocks import first_block_start, sequence_end
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine import slot_state
from megatron_opdlm.engine.pages import Pages
from megatron_opdlm.planning import balance
from megatron_opdlm.records import Block, Prompt, Trajectory, Vocabulary


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


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A request without a slot."""

    number: int
    order: int  # of its first admission; older ones keep their pages
    ids: list[int]  # the prompt and, of one that had to leave its slot, its finished blocks
    committed_at: list[int]  # of the finished blocks' response tokens
    sureness: list[int]
    margins: list[float]
    passes: int


class Queue:
    """All requests of a call: what waits, and what has its trajectory."""

    def __init__(
        self,
        requests: Sequence[Request],
        rules: Decoding,
        vocabulary: Vocabulary,
        key: tuple[int, int],
        prefill_tokens: int,
    ) -> None:
        self.requests, self.rules, self.vocabulary = requests, rules, vocabulary
        self.prefill_tokens = prefill_tokens
        samples = torch.tensor([request.sample for request in requests], dtype=torch.int64)
        self.keys = randomness.hash_keys(*key, samples).numpy()
        # The longest possible ones first, so that no slot is left alone with a long one at the end.
        by_length = sorted(
            range(len(requests)), key=lambda i: -requests[i].positions(rules.block_size)
        )
        self.waiting = deque(
            _Waiting(
                number=i,
                order=order,
                ids=requests[i].prompt.ids,
                committed_at=[],
                sureness=[],
                margins=[],
                passes=0,
            )
            for order, i in enumerate(by_length)
        )
        self.finished: dict[int, Trajectory] = {}

    @property
    def done(self) -> bool:
        """Every request has its trajectory."""
        return len(self.finished) == len(self.requests)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What ``SlotState.admit`` is to be given, and what it adds to the next pass."""

    slots: Tensor  # [n]
    numbers: Tensor  # [FIELDS, n]
    tokens: Tensor  # [n, positions]
    committed: Tensor  # [n, B]
    rows: int
    draws: int


class SlotBooks:
    """Slots of one group."""

    def __init__(
        self,
        queue: Queue,
        slots: int,
        positions: int,
        pages: Pages,
        blocks_ahead: int,
        committed: Callable[[Block], None] | None = None,
    ) -> None:
        """``blocks_ahead``: blocks from the last known block's start that a slot may have to have
        room for in the next pass. ``committed``: given each block of a response when it is known
        to be finished.
        """
        self.committed = committed
        self.queue, self.pages, self.ahead = queue, pages, blocks_ahead * queue.rules.block_size
        self.request = np.full(slots, -1)  # which request a slot works on; -1: free
        self.order = np.zeros(slots, dtype=np.int64)
        self.known = np.zeros(slots, dtype=np.int64)  # tokens that it came with
        self.block_start, self.end = np.zeros((2, slots), dtype=np.int64)
        self.tokens = np.zeros((slots, positions), dtype=np.int64)
        self.committed_at, self.sureness = np.zeros((2, slots, positions), dtype=np.int64)
        self.margins = np.zeros((slots, positions))  # zeros where they are not recorded
        # Passes of the whole sequence, and those before its current block.
        self.passes, self.passes_before = np.zeros((2, slots), dtype=np.int64)
        self._short = True  # a sequence may lack pages
        self._column = np.arange(queue.rules.block_size)

    @property
    def active(self) -> int:
        """Slots that hold a sequence, as far as is known."""
        return int((self.request >= 0).sum())

    def learn(self, report: np.ndarray) -> list[Trajectory]:
        """Enter what a pass did to each slot ([S, numbers], ``SlotState.commit``); returns the
        trajectories that ended.
        """
        size = self.queue.rules.block_size
        self.passes += report[:, slot_state.RAN]
        (finished,) = report[:, slot_state.FINISHED].nonzero()
        if not len(finished):
            return []
        place = finished[:, None], self.block_start[finished, None] + self._column
        new = report[finished, slot_state.TOKENS :]
        books = self.tokens, self.committed_at, self.sureness, self.margins.view(np.int64)
        for book, part in zip(books, range(0, new.shape[1], size), strict=False):
            book[place] = new[:, part : part + size]
        self.block_start[finished] += size
        self._short = True
        if self.committed is not None:
            for slot in finished.tolist():
                self.committed(self._block(slot))
        self.passes_before[finished] = self.passes[finished]
        (over,) = report[:, slot_state.OVER].nonzero()
        return [self._retire(slot) for slot in over.tolist()]

    def _retire(self, slot: int) -> Trajectory:
        number = int(self.request[slot])
        made = self._trajectory(slot, self.queue.requests[number])
        self.queue.finished[number] = made
        self._free(slot)
        return made

    def _free(self, slot: int) -> None:
        self.request[slot] = -1
        self.pages.take_back(slot)

    def _trajectory(self, slot: int, request: Request) -> Trajectory:
        start, stop, passes = len(request.prompt.ids), self.block_start[slot], self.passes[slot]
        response = self.tokens[slot, start:stop].tolist()
        kept, reason = self._through_end(response), "stop"
        if kept is None or kept > request.max_new_tokens:
            kept, reason = min(len(response), request.max_new_tokens), "length"
        return Trajectory(
            sample=request.sample,
            prompt=request.prompt,
            response_ids=response,
            committed_at=self.committed_at[slot, start:stop].tolist(),
            confidence=(self.sureness[slot, start:stop] / slot_state.SURE).tolist(),
            margins=self.margins[slot, start:stop].tolist() if self.queue.rules.margins else [],
            response_tokens=kept,
            finish_reason=reason,
            forwards=int(passes),
            passes=int(passes),
        )

    def _block(self, slot: int) -> Block:
        """The block before ``block_start``, cut to what users get."""
        request = self.queue.requests[int(self.request[slot])]
        prompt_end, stop = len(request.prompt.ids), int(self.block_start[slot])
        start = max(stop - self.queue.rules.block_size, prompt_end)
        stop = min(stop, prompt_end + request.max_new_tokens)
        ids = self.tokens[slot, start:stop].tolist()
        ids = ids[: self._through_end(ids)]
        passes = self.committed_at[slot, start : start + len(ids)].tolist()
        return Block(sample=request.sample, ids=ids, committed_at=passes)

    def _through_end(self, ids: list[int]) -> int | None:
        """How many of a response's tokens the first end token leaves."""
        ends = (ids.index(end) for end in self.queue.vocabulary.end_ids if end in ids)
        first = min(ends, default=None)
        return None if first is None else first + 1

    @property
    def covered(self) -> np.ndarray:
        """Blocks [S] that each sequence has pages for."""
        return np.minimum(self.pages.covered, self.end) // self.queue.rules.block_size

    def make_room(self) -> list[int]:
        """Give every sequence the pages that the next pass can need. Where they are used up, the
        youngest sequences leave their slots, which are returned; they will go on from their last
        finished block. A sequence that is the youngest waits.
        """
        left: list[int] = []
        if not self._short:
            return left
        want = np.minimum(self.block_start + self.ahead, self.end)
        short = np.flatnonzero((want > self.pages.covered) & (self.request >= 0))
        self._short = bool(len(short))
        if not self._short:
            return left
        missing = self.pages.missing(want)
        for slot in short[np.argsort(self.order[short])].tolist():
            while len(self.pages.free) < missing[slot] and slot not in left:
                youngest = int(np.where(self.request >= 0, self.order, -1).argmax())
                if youngest == slot:
                    break
                self._leave(youngest)
                left.append(youngest)
            if slot not in left and len(self.pages.free) >= missing[slot]:
                self.pages.give(slot, int(missing[slot]))
        return left

    def _leave(self, slot: int) -> None:
        """Back to the queue with all finished blocks."""
        number = int(self.request[slot])
        start = len(self.queue.requests[number].prompt.ids)
        stop = int(max(self.block_start[slot], self.known[slot]))
        self.queue.waiting.appendleft(
            _Waiting(
                number=number,
                order=int(self.order[slot]),
                ids=self.tokens[slot, :stop].tolist(),
                committed_at=self.committed_at[slot, start:stop].tolist(),
                sureness=self.sureness[slot, start:stop].tolist(),
                margins=self.margins[slot, start:stop].tolist(),
                passes=int(self.passes_before[slot]),
            )
        )
        self._free(slot)

    def admit(self) -> Admission | None:
        """Give waiting requests free slots; prompts ride along in the next forward.

        Prompts of at most ``prefill_tokens`` together, or one that is longer: a forward must not
        take the memory of all prompts at once, nor keep the running sequences waiting for them. A
        page is left for every running sequence that may yet ask for one.
        """
        queue, room, slots = self.queue, self.queue.prefill_tokens, []
        if not queue.waiting:
            return None
        free = np.flatnonzero(self.request < 0).tolist()
        growing = (self.pages.covered < self.end) & (self.request >= 0)
        reserve = int(np.count_nonzero(growing)) if free else 0
        for slot in free:
            if not queue.waiting:
                break
            tokens = len(queue.waiting[0].ids)
            positions, end = self._positions(queue.waiting[0])
            pages = self.pages.needed(positions)
            if (tokens > room and slots) or pages + reserve > len(self.pages.free):
                break
            room -= tokens
            reserve += pages * self.pages.page_tokens < end
            self._enter(slot, queue.waiting.popleft())
            slots.append(slot)
        return self._admission(np.array(slots)) if slots else None

    def _positions(self, waiting: _Waiting) -> tuple[int, int]:
        """What it needs pages for at first, and at the end."""
        size = self.queue.rules.block_size
        end = self.queue.requests[waiting.number].positions(size)
        return min(first_block_start(len(waiting.ids), size) + self.ahead, end), end

    def _enter(self, slot: int, waiting: _Waiting) -> None:
        known = len(waiting.ids)
        positions, end = self._positions(waiting)
        self.request[slot], self.order[slot] = waiting.number, waiting.order
        self.known[slot], self.end[slot] = known, end
        self.block_start[slot] = first_block_start(known, self.queue.rules.block_size)
        self.tokens[slot, :known] = waiting.ids
        made = slice(known - len(waiting.committed_at), known)
        self.committed_at[slot, made] = waiting.committed_at
        self.sureness[slot, made] = waiting.sureness
        self.margins[slot, made] = waiting.margins
        self.passes[slot] = self.passes_before[slot] = waiting.passes
        self.pages.give(slot, self.pages.needed(positions))

    def _admission(self, slots: np.ndarray) -> Admission:
        size, known, start = self.queue.rules.block_size, self.known[slots], self.block_start[slots]
        numbers = np.zeros((slot_state.FIELDS, len(slots)), dtype=np.int64)
        numbers[slot_state.BLOCK] = start // size
        numbers[slot_state.END] = self.end[slots] // size
        numbers[slot_state.KEY] = self.queue.keys[self.request[slots]]
        position = np.arange(self.tokens.shape[1])
        is_known = position < known[:, None]
        tokens = np.where(is_known, self.tokens[slots], self.queue.vocabulary.mask_id)
        in_block = start[:, None] + self._column < known[:, None]
        return Admission(
            slots=torch.from_numpy(slots),
            numbers=torch.from_numpy(numbers),
            tokens=torch.from_numpy(tokens),
            committed=torch.from_numpy(np.where(in_block, slot_state.PROMPT, 0)),
            rows=int((start // size + 1).sum()),
            draws=int((~in_block).sum()),
        )
