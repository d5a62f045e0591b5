"""The device's side of a denoising pass over this rank's pipeline stage: forward, draw, commit.

``ExactPasses`` give every pass the size that it needs, which the host asks the device for: that
costs nothing where they are one machine. ``FixedPasses`` pad rows and drawn tokens to one of a few
sizes; what each size runs is captured once and replayed. Nobody waits for the device then, and
whoever does not fit takes part in the next pass.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.diffusion import denoising
from megatron_opdlm.engine.decode_plans import DecodePlans
from megatron_opdlm.engine.slot_state import (
    BLOCK,
    CLEAN,
    EXACT_HEADER,
    FIXED_HEADER,
    Draws,
    SlotState,
)
from megatron_opdlm.hardware import Capture, Run, select_hardware
from megatron_opdlm.model.flops import attended_pairs
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.vocab_parallel import project

LEAST = 8  # smaller passes cost as much


@dataclass(kw_only=True)
class Flight:
    """A pass under way: its sizes and the messages that are out."""

    rows: int
    draws: int
    read_rows: int  # tokens that the last layer carries on after its attention
    pairs: int | None  # (query, key) pairs; None: the report says
    # [3, M + 1] token, confidence, entropy; 4: and margin. Last, whether to stop.
    drawn: parallel.Sending
    activations: parallel.Sending | None
    ignored: set[int]  # slots whose sequences left while it was under way


class _Passes:
    """What both kinds share: the model on one group's rows, and drawing."""

    def __init__(self, model: LanguageModel, state: SlotState, plans: DecodePlans) -> None:
        self.model, self.state, self.plans = model, state, plans
        self.device = state.device
        self.first, self.last = parallel.is_first_stage(), parallel.is_last_stage()
        self.alone = model.config.tensor_model_parallel_size * parallel.pipeline_size() == 1
        hidden, dtype = model.shape.hidden, model.config.params_dtype
        # Shifted logits: the hidden state before each block, as it was last computed clean.
        self.carry = torch.zeros(state.slots + 1, hidden, dtype=dtype, device=self.device)
        ids = state.vocabulary.forbidden_ids
        self.forbidden = model.shard.columns_of(ids, self.device) if model.post_process else None

    def receive(self, tokens: int) -> Tensor | None:
        """Activations [N, 1, H] of the stage before, None on the first one."""
        if self.first:
            return None
        shape = (tokens, 1, self.model.shape.hidden)
        return parallel.receive_from_previous_stage(
            shape, self.model.config.params_dtype, self.device
        )

    def decide(self, drawn: Tensor) -> parallel.Sending:
        """Make the drawn tokens of one rank those of all ranks of the replica."""
        if self.alone:
            return parallel.Sending(work=None, tensor=drawn)
        return parallel.broadcast_from_last_stage(drawn)

    def draw(self, hidden_MH: Tensor, draws: Draws) -> Tensor:
        """Draw a token at every entry -> [3, M] token, confidence, entropy; 4: and margin."""
        model, rules = self.model, self.state.rules
        if rules.logit_shift:
            hidden_MH = self._carried(hidden_MH, draws)
        logits = project(hidden_MH, model.head_weight, model.shard, self.forbidden)
        drawn = denoising.draw(
            logits,
            self.state.uniform(draws),
            temperature=rules.temperature,
            top_k=rules.top_k,
            top_p=rules.top_p,
            with_entropy=rules.remasking == "entropy_bounded",
            shard=model.shard,
            numbers_at_once=select_hardware().draw_numbers,
        )
        numbers = [drawn.token.double(), drawn.confidence, drawn.entropy]
        if rules.margins:
            numbers.append(denoising.margins(logits, model.shard))
        return torch.stack(numbers)

    def none_drawn(self, count: int) -> Tensor:
        """Room for as many drawn tokens, and whether to stop."""
        rows = 4 if self.state.rules.margins else 3
        return torch.zeros(rows, count + 1, dtype=torch.float64, device=self.device)

    def _carried(self, hidden_MH: Tensor, draws: Draws) -> Tensor:
        """Shifted logits: a block's first position is read from the last one before the block as it
        was last computed clean, which is in the window of the block's first pass and carried from
        then on.
        """
        state, slot = self.state, draws.slot_M
        opens = draws.place_M % state.rules.block_size == 0
        computed = opens & (state.numbers[CLEAN] < state.numbers[BLOCK])[slot]
        self.carry.index_copy_(0, torch.where(computed, slot, state.slots), hidden_MH)
        return torch.where(opens[:, None], self.carry[slot], hidden_MH)


class ExactPasses(_Passes):
    """Every pass kernel by kernel, in the size that it needs."""

    lag = 0  # reports that the host may be behind
    header = EXACT_HEADER

    def launch(self, stop: bool, *, keep_step: bool) -> Flight | None:
        """Run a pass up to the drawn tokens; without anything to do only to ``keep_step``."""
        state = self.state
        state.choose(None)
        rows = int(state.now.rows.sum())
        if not rows and not keep_step:
            return None
        run = state.window_rows(max(rows, 1))
        self.draws = state.draws(None)
        read = state.read()[self.draws.place_M]
        plan = self.plans.plan(run, read)
        activations = self.receive(len(run.tokens_N))
        if activations is not None:
            self.model.set_input_tensor(activations)
        output = self.model.run(run.tokens_N, run.position_N, plan)
        drawn = self.none_drawn(len(read))
        drawn[:, -1] = stop
        sent = None
        if self.last:
            drawn[:, :-1] = self.draw(output.flatten(0, 1), self.draws)
        else:
            sent = parallel.send_to_next_stage(output)
        return Flight(
            rows=len(run.slot_R),
            draws=len(read),
            read_rows=len(read),
            pairs=attended_pairs(plan),
            drawn=self.decide(drawn),
            activations=sent,
            ignored=set(),
        )

    def commit(self, flight: Flight) -> Tensor:
        """The pass's report, once its drawn tokens are here."""
        return self.state.commit(self.draws, flight.drawn.wait(), fixed=False)


class FixedPasses(_Passes):
    """Passes of a few sizes, captured and replayed."""

    lag = 1
    header = FIXED_HEADER

    def __init__(
        self, model: LanguageModel, state: SlotState, plans: DecodePlans, capture: Capture
    ) -> None:
        super().__init__(model, state, plans)
        self._capture = capture
        self.row_sizes = sizes_to(2 * state.slots)
        self.draw_sizes = sizes_to(state.slots * state.rules.block_size)
        self._replays: dict[tuple[str, int], Run] = {}
        self._limits = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._draw_limit = 0
        # What one captured piece leaves for the next, whatever their sizes: final hidden states of
        # the current blocks, drawn tokens of each size, and the activations from the stage before.
        places = state.slots * state.rules.block_size + 1
        self._hidden = self.carry.new_zeros(places if model.post_process else 0, model.shape.hidden)
        self._drawn: dict[int, Tensor] = {}
        self._stops: dict[int, bool] = {}  # what these last said
        self._activations: dict[int, Tensor] = {}

    def launch(self, rows: int, draws: int, stop: bool) -> Flight:
        """Run a pass up to the drawn tokens, with room for so many rows and draws at least."""
        if rows <= self.row_sizes[-1]:
            rows = self.row_sizes[bisect_left(self.row_sizes, rows)]
        draws = self.draw_sizes[bisect_left(self.draw_sizes, min(draws, self.draw_sizes[-1]))]
        tokens = rows * self.state.rules.block_size
        if draws != self._draw_limit:  # every kernel outside the captured ones costs its launch
            self._limits[1].fill_(draws)
            self._draw_limit = draws
        received = self.receive(tokens)
        if received is not None:
            self._input(rows).copy_(received)
        output = self._replay("forward", rows, partial(self._forward, rows))
        drawn, sent = self._out(draws), None
        if self.last:
            self._replay("draw", draws, partial(self._draw, draws))
            if stop != self._stops.get(draws, False):
                drawn[:, -1].fill_(float(stop))
                self._stops[draws] = stop
        else:
            sent = parallel.send_to_next_stage(output.clone())  # the next replay overwrites it
        return Flight(
            rows=rows,
            draws=draws,
            read_rows=tokens,  # how many are read differs from pass to pass
            pairs=None,
            drawn=self.decide(drawn),
            activations=sent,
            ignored=set(),
        )

    def commit(self, flight: Flight) -> Tensor:
        """The pass's report, once its drawn tokens are here; the next one overwrites it."""
        flight.drawn.wait()
        return self._replay("commit", flight.draws, partial(self._commit, flight.draws))

    def _forward(self, rows: int) -> Tensor:
        state = self.state
        self._limits[0].fill_(rows)
        state.choose(self._limits)
        run = state.window_rows(rows)
        if not self.model.pre_process:
            self.model.set_input_tensor(self._input(rows))
        output = self.model.run(run.tokens_N, run.position_N, self.plans.plan(run, None))
        if self.model.post_process:
            self._hidden.copy_(output.flatten(0, 1).index_select(0, state.read()))
        return output

    def _draw(self, count: int) -> Tensor:
        draws, out = self.state.draws(count), self._out(count)
        out[:, :-1].copy_(self.draw(self._hidden.index_select(0, draws.place_M), draws))
        return out

    def _commit(self, count: int) -> Tensor:
        return self.state.commit(self.state.draws(count), self._out(count), fixed=True)

    def _out(self, count: int) -> Tensor:
        if count not in self._drawn:
            self._drawn[count] = self.none_drawn(count)
        return self._drawn[count]

    def _input(self, rows: int) -> Tensor:
        if rows not in self._activations:
            tokens = rows * self.state.rules.block_size
            self._activations[rows] = self.carry.new_zeros(tokens, 1, self.carry.shape[1])
        return self._activations[rows]

    def _replay(self, piece: str, size: int, run: Run) -> Tensor:
        """Run a piece; captured the first time, unless it is one of the long forwards in which
        prompts join.
        """
        if piece == "forward" and size > self.row_sizes[-1]:
            return run()
        if (piece, size) not in self._replays:
            with self._idle():
                self._replays[piece, size] = self._capture(run)
        return self._replays[piece, size]()

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Nobody is at work: capturing runs a piece more than once to warm it up."""
        state = self.state
        kept = [
            state.tokens,
            state.committed,
            state.sureness,
            state.margins,
            state.numbers,
            *vars(state.now).values(),
        ]
        copies = [tensor.clone() for tensor in kept]
        state.begin(float(state.threshold))
        for tensor in vars(state.now).values():
            tensor.zero_()
        try:
            yield
        finally:
            for tensor, copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)


def sizes_to(most: int) -> list[int]:
    """Sizes that are captured: powers of two with three steps between them, up to ``most``."""
    steps = (step << power for power in range(most.bit_length()) for step in (8, 10, 12, 14))
    return sorted({step for step in steps if LEAST <= step < most} | {max(most, 1)})
