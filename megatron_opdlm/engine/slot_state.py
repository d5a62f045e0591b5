"""What is known of the sequences being decoded, on the device that decodes them.

Every function is a fixed sequence of tensor operations whose shapes follow from sizes that the
caller gives, never from values, so a GPU runs a whole pass without asking its host. S slots and a
scratch slot behind them, B tokens per block, R rows of one block each, M drawn tokens. Positions
are counted in blocks.

A slot runs its *window*, the blocks that are not final in the cache yet. Where rows or drawn tokens
of all slots are more than the sizes given, the last slots wait for the next pass, which serves them
first: who runs when never changes a token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion import denoising, randomness
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.records import Vocabulary

# Rows of ``SlotState.numbers``, one number a slot: the current block (NOWHERE: the slot is free),
# the first block that is not final in the cache, passes over the current block, the block after
# the last one, the key of the sample's random numbers, whether it had to wait.
BLOCK, CLEAN, PASSES, END, KEY, WAITED = range(6)
FIELDS = 6
NOWHERE = 1 << 40
PROMPT = -1  # in ``committed``: a token of the prompt, which no pass committed

# A report's first numbers: whether to stop, place of a faulty draw; of fixed sizes also the (query,
# key) pairs and rows of this pass, rows and drawn tokens that the next one needs. Then for each
# slot: whether it ran, finished its block, ended; its block's tokens, when each was committed, and
# with what confidence, in units of 1 / SURE; where asked for, its margin's bits (float64).
STOP, FAULTY, PAIRS, ROWS_RUN, ROWS, DRAWS = range(6)
EXACT_HEADER, FIXED_HEADER = 2, 6
RAN, FINISHED, OVER, TOKENS = range(4)
SURE = 1_000_000


def report_width(rules: Decoding) -> int:
    """Numbers of a slot's report."""
    return TOKENS + (4 if rules.margins else 3) * rules.block_size


class Rows(NamedTuple):
    """What the next forward runs; padding rows work in the scratch slot."""

    slot_R: Tensor
    start_R: Tensor  # absolute position of each row's first token
    tokens_N: Tensor  # N = R * B
    position_N: Tensor


class Draws(NamedTuple):
    """Where tokens are drawn; padding entries belong to the scratch slot."""

    place_M: Tensor  # slot * B + column
    slot_M: Tensor
    position_M: Tensor


@dataclass(frozen=True, kw_only=True)
class TakingPart:
    """Who runs in the pass under way. The same tensors in every pass: what is captured reads them
    there.
    """

    runs: Tensor  # bool [S]
    masked: Tensor  # bool [S, B] where tokens are drawn
    rows: Tensor  # [S]
    last: Tensor  # [S] number of the row behind the slot's last one


class SlotState:
    """Slots that are decoded together."""

    def __init__(
        self,
        slots: int,
        positions: int,
        rules: Decoding,
        vocabulary: Vocabulary,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        size = rules.block_size
        self.slots, self.positions, self.rules, self.device = slots, positions, rules, device
        self.vocabulary = vocabulary
        # With B = 1 and shifted logits the fresh token is predicted from the one before it, so its
        # mask token is left out of the window.
        self.fresh = 0 if rules.logit_shift and size == 1 else 1
        self.tokens = zeros(slots + 1, positions)
        self.committed = zeros(slots, size)  # pass of the current block's tokens; 0: masked
        self.sureness = zeros(slots, size)  # confidence of those that a pass has committed
        self.margins = zeros(slots, size, dtype=torch.float64)  # of those, where they are recorded
        self.numbers = zeros(FIELDS, slots + 1)
        self.covered = zeros(slots)  # blocks that the cache has room for, at most END
        self.threshold = zeros(dtype=torch.float64)
        self.now = TakingPart(
            runs=zeros(slots, dtype=torch.bool),
            masked=zeros(slots, size, dtype=torch.bool),
            rows=zeros(slots),
            last=zeros(slots),
        )
        self.block, self.clean, self.passes, self.end, _, self.waited = self.numbers[:, :slots]
        self._column = torch.arange(size, device=device)
        self._place = torch.arange(slots, device=device)[:, None] * positions + self._column

    def begin(self, threshold: float) -> None:
        """Empty all slots for another call."""
        self.numbers.zero_()
        self.block.fill_(NOWHERE)
        self.threshold.fill_(threshold)

    def admit(self, slots: Tensor, numbers: Tensor, tokens: Tensor, committed: Tensor) -> None:
        """Fill slots [n]: ``numbers`` [FIELDS, n], ``tokens`` [n, positions] and the commits [n, B]
        of their current blocks.
        """
        self.numbers.index_copy_(1, slots, numbers)
        self.tokens.index_copy_(0, slots, tokens)
        self.committed.index_copy_(0, slots, committed)

    def needs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Who could run now (bool [S]); rows [S] and masked positions (bool [S, B]) of those."""
        ready = self.block < self.covered
        rows = (self.block - self.clean + self.fresh) * ready
        return ready, rows, (self.committed == 0) & ready[:, None]

    def choose(self, limits: Tensor | None) -> None:
        """Decide who takes part in the next pass: everyone (None), or those that fit into
        ``limits`` [2] of rows and drawn tokens.
        """
        runs, rows, masked = self.needs()
        if limits is not None:
            need = torch.stack([rows, masked.sum(1)])
            early = need * self.waited
            after_early = early.sum(1, keepdim=True) + (need - early).cumsum(1)
            reached = torch.where(self.waited > 0, early.cumsum(1), after_early)
            fits = (reached <= limits[:, None]).all(0)
            self.waited.copy_(runs & ~fits)
            runs = runs & fits
            rows, masked = rows * runs, masked & runs[:, None]
        self.now.runs.copy_(runs)
        self.now.masked.copy_(masked)
        self.now.rows.copy_(rows)
        torch.cumsum(rows, 0, out=self.now.last)

    def window_rows(self, count: int) -> Rows:
        """The windows of those who take part, slot by slot, as ``count`` rows."""
        now, size = self.now, self.rules.block_size
        number = torch.arange(count, device=self.device)
        slot = torch.searchsorted(now.last, number, right=True)  # padding: S
        # From a row's number to its block; a padding row's is 0.
        offset = F.pad(self.clean + now.rows - now.last, (0, 1), value=-NOWHERE)
        start = (number + offset[slot]).clamp_(min=0) * size
        position = start[:, None] + self._column
        tokens = torch.take(self.tokens, slot[:, None] * self.positions + position)
        return Rows(slot, start, tokens.flatten(), position.flatten())

    def draws(self, count: int | None) -> Draws:
        """The masked positions of those who take part, slot by slot, as ``count`` entries; None: as
        many as there are, but at least one.
        """
        masked, size = self.now.masked.flatten(), self.rules.block_size
        nowhere = len(masked)
        if count is None:
            place = masked.nonzero().flatten()
            place = place if len(place) else torch.full((1,), nowhere, device=self.device)
        else:
            target = torch.where(masked, masked.cumsum(0) - 1, count)
            place = torch.full((count + 1,), nowhere, device=self.device)
            place.scatter_(0, target, torch.arange(nowhere, device=self.device))
            place = place[:count]
        slot = place // size
        # A block's first place is slot * B.
        offset = (self.numbers[BLOCK] * size)[slot] - slot * size
        return Draws(place, slot, place + offset)

    def read(self) -> Tensor:
        """Number of the token of the windows [S * B + 1] whose hidden state predicts each token of
        the current blocks: that token itself, with shifted logits the one before. Where a slot does
        not take part, and at the last place, any.
        """
        first = (self.now.last - self.fresh) * self.rules.block_size - int(self.rules.logit_shift)
        return F.pad((first[:, None] + self._column).clamp_(min=0).flatten(), (0, 1))

    def uniform(self, draws: Draws) -> Tensor:
        """The random number [M] of each drawn token: its key is that of the sample, its position
        and the pass.
        """
        key, passes = self.numbers[KEY][draws.slot_M], self.numbers[PASSES][draws.slot_M]
        bits = randomness.absorb(key, draws.position_M, passes, randomness.DRAW_TOKEN)
        return randomness.uniform_of(bits)

    def commit(self, draws: Draws, drawn: Tensor, *, fixed: bool) -> Tensor:
        """Keep what the remasking rule chooses of ``drawn`` [3 or 4, M + 1] (token, confidence,
        entropy, margin; last, whether to stop), close finished blocks and end sequences: with an
        end token in the response, or at the length limit. Returns the report.
        """
        now = self.now
        block = self.block * now.runs
        counts = self._counts() if fixed else ()
        chosen, tokens, sureness, *margins = self._choose(draws, drawn[:, :-1])
        self.passes += now.runs
        committed = torch.where(chosen, self.passes[:, None], self.committed)
        place = self._place + (block * self.rules.block_size)[:, None]
        tokens = torch.where(chosen, tokens, torch.take(self.tokens, place))
        self.tokens.put_(place, tokens)
        self.sureness.copy_(torch.where(chosen, sureness, self.sureness))
        for margin in margins:
            self.margins.copy_(torch.where(chosen, margin, self.margins))
        self.clean.copy_(torch.where(now.runs, block, self.clean))
        finished = now.runs & (committed != 0).all(1)
        stopped = (self._is_end(tokens) & (committed > 0)).any(1)
        over = finished & (stopped | (block + 1 >= self.end))
        goes_on = finished ^ over
        what = (flag[:, None] for flag in (now.runs, finished, over))
        made = [tokens, committed, self.sureness]
        if margins:
            made.append(self.margins.view(torch.int64))
        report = torch.cat([*what, *made], dim=1).flatten()
        self.block += over * NOWHERE + goes_on
        self.passes.masked_fill_(goes_on, 0)
        self.committed.copy_(committed.masked_fill_(goes_on[:, None], 0))
        if fixed:
            counts = (*counts, *(need.sum() for need in self.needs()[1:]))
        header = torch.stack([drawn[0, -1].long(), self._faulty(draws, drawn[1, :-1]), *counts])
        return torch.cat([header, report])

    def _counts(self) -> tuple[Tensor, Tensor]:
        """(query, key) pairs and rows of this pass, without padding."""
        rows, size = self.now.rows, self.rules.block_size
        blocks_seen = rows * self.clean + rows * (rows + 1) // 2
        return blocks_seen.sum() * size**2, rows.sum()

    def _faulty(self, draws: Draws, confidence: Tensor) -> Tensor:
        """Place of the first token that could not be drawn, S * B without one: a logit that is not
        finite leaves no probability.
        """
        places = self.slots * self.rules.block_size
        return torch.where(confidence.isfinite(), places, draws.place_M).amin()

    def _choose(self, draws: Draws, drawn: Tensor) -> tuple[Tensor, ...]:
        """Which positions of the current blocks are committed (bool [S, B]), the drawn tokens,
        their confidences in units of 1 / SURE and, where ``drawn`` has them, their margins [S, B].
        """
        size = self.rules.block_size
        blocks = drawn.new_zeros(len(drawn), self.slots * size + 1)
        blocks.index_copy_(1, draws.place_M, drawn)
        token, confidence, entropy, *margins = blocks[:, :-1].unflatten(1, (self.slots, size))
        chosen = denoising.choose_commits(
            confidence,
            entropy,
            self.now.masked,
            self.passes,
            steps=self.rules.denoising_steps,
            remasking=self.rules.remasking,
            threshold=self.threshold,
            entropy_bound=self.rules.entropy_bound,
        )
        return chosen, token.long(), (confidence * SURE).round().long(), *margins

    def _is_end(self, tokens: Tensor) -> Tensor:
        ends = torch.zeros_like(tokens, dtype=torch.bool)
        for end in self.vocabulary.end_ids:
            ends |= tokens == end
        return ends
