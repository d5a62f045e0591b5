"""Rollout engine: the student module itself generates, block by block, over slots of one KV cache.

Every forward takes, for each active slot, the *window* of tokens that are not final in the cache
yet: [finished block | fresh block] in the first pass of a block, [fresh block] in the others,
[whole prompt | fresh block] right after admission. So a block costs T forwards: committing it
shares a forward with the next block's first pass, and so does prefill. Sequences enter and leave as
they finish. Autoregressive decoding is the case B = 1 with shifted logits.

With pipeline stages the slots form as many groups as there are stages; while one group's drawn
tokens travel back from the last stage, the other groups keep the stages busy.

Ranks that share out experts trade tokens in every layer, so they keep step: each round every one of
them runs a forward of each group, with one masked block in a scratch slot where it has no work, and
all stop after the round that finds none of them at work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion import denoising, randomness
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.cache_budget import fitting_slots, open_cache
from megatron_opdlm.engine.decode_forward import BucketForward, Capture, DecodeForward, RowForward
from megatron_opdlm.engine.slots import Masked, Request, SlotTable, Windows, split_over_replicas
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.flops import forward_flops
from megatron_opdlm.model.gpt import LanguageModel, without_sequence_parallel
from megatron_opdlm.model.vocab_parallel import project
from megatron_opdlm.records import Rollout, Trajectory, Vocabulary
from megatron_opdlm.supervision import activity

__all__ = ["Request", "generate", "generate_over_copies"]


def generate_over_copies(
    model: LanguageModel,
    requests: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary,
    *,
    key: tuple[int, int],
    options: EngineOptions,
    stop: Callable[[], bool] = lambda: False,
    finished: Callable[[Trajectory], None] = lambda _: None,
    close: Callable[[], None] = lambda: None,
) -> Rollout:
    """Share the requests out over all copies of the model, ``generate``, gather: trajectories are
    in the order of the requests, on every rank; a copy without work is legal. Not complete, and
    without trajectories, where any copy was told to stop. ``close``: called when this rank's copy
    has made its share.
    """
    mine = split_over_replicas(requests, parallel.generators(), decoding)[parallel.generator_rank()]
    made = generate(
        model,
        [requests[i] for i in mine],
        decoding,
        vocabulary,
        key=key,
        options=options,
        stop=stop,
        finished=finished,
    )
    close()
    if not parallel.all_succeeded(made.complete):
        return Rollout(trajectories=[], flops=0.0, complete=False)
    pairs = list(zip(mine, made.trajectories, strict=True))
    done = dict(parallel.gather_objects_over_generators(pairs))
    flops = torch.tensor(made.flops, dtype=torch.float64, device=select_hardware().device)
    return Rollout(
        trajectories=[done[i] for i in range(len(requests))],
        flops=float(parallel.sum_over_generators(flops)),
    )


@torch.inference_mode()
def generate(
    model: LanguageModel,
    requests: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary,
    *,
    key: tuple[int, int],
    options: EngineOptions = EngineOptions(),
    stop: Callable[[], bool] = lambda: False,
    finished: Callable[[Trajectory], None] = lambda _: None,
) -> Rollout:
    """Generate this model replica's requests; trajectories are in their order and the same on all
    its ranks.

    ``key`` = (seed, step): with the sample's number it decides every random draw, so a response
    depends neither on its batch nor on the layout. Requests that do not fit the budgets of
    ``options`` wait. ``stop``: asked after every forward on the rank that draws; True ends the call
    early on all ranks of the replica. ``finished``: given each trajectory as it ends.

    Raises RunError for a cache that cannot hold the longest request (other replicas may not find
    it), InputError for an empty prompt where logits are read from the position before.
    """
    if not requests and parallel.expert_size() == 1:
        return Rollout(trajectories=[], flops=0.0)
    rules = decoding if decoding.mode == "diffusion" else decoding.autoregressive()
    _check_prompts(requests, rules)
    positions = max((r.positions(rules.block_size) for r in requests), default=rules.block_size)
    # How many tokens an expert gets is known on the way only, so nothing is captured.
    graphs = options.graphs and model.shape.experts is None
    kind, capture = _way_to_decode(options.attention, graphs)
    # A slot for rows that pad a captured forward, or that only keep step.
    scratch = 1 if capture or parallel.expert_size() > 1 else 0
    fitting = fitting_slots(model, positions, options.kv_cache_tokens)
    count = min(options.slots, len(requests), max(1, fitting - scratch))
    table = SlotTable(requests, rules, vocabulary, count, positions, options.prefill_tokens)
    was_training = model.training
    model.eval()
    try:
        with without_sequence_parallel(model):
            cache = open_cache(model, count + scratch, positions)
            forward: DecodeForward = (
                BucketForward(model, cache, rules.block_size)
                if kind == "buckets"
                else RowForward(model, cache, rules.block_size, capture)
            )
            return _Engine(model, table, key, forward, stop, finished).run()
    finally:
        model.train(was_training)


def _way_to_decode(attention: str, graphs: bool) -> tuple[str, Capture | None]:
    """Which form of forward runs here, and what captures the forwards of rows."""
    hardware = select_hardware()
    kind = hardware.decode_attention if attention == "auto" else attention
    return kind, hardware.capture if graphs and kind == "rows" else None


def _check_prompts(requests: Sequence[Request], rules: Decoding) -> None:
    for request in requests:
        if rules.logit_shift and not request.prompt.ids:
            raise InputError(
                f"prompt {request.prompt.index} is empty: with mode=ar or "
                "loss.logit_shift=true its first token has no position to be predicted from; "
                "give at least one prompt token"
            )


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A group's forward under way: what will be drawn where, and the messages that are out."""

    masked: Masked | None  # None: it only kept step
    drawn: parallel.Sending | None  # [3, M + 1] token, confidence, entropy; last whether to stop
    activations: parallel.Sending | None


class _Engine:
    """Runs the model over a slot table. M masked positions, H hidden size."""

    def __init__(
        self,
        model: LanguageModel,
        table: SlotTable,
        key: tuple[int, int],
        forward: DecodeForward,
        stop: Callable[[], bool],
        finished: Callable[[Trajectory], None],
    ) -> None:
        self.model, self.table, self.rules, self.key = model, table, table.rules, key
        self.forward, self.finished, self.stop, self.stopped = forward, finished, stop, False
        self.device = next(model.parameters()).device
        slots, dtype = len(table.request), model.config.params_dtype
        self.keeps_step = parallel.expert_size() > 1
        groups = torch.arange(slots).tensor_split(parallel.pipeline_size())
        self.groups = [group for group in groups if self.keeps_step or len(group)]
        ids = table.vocabulary.forbidden_ids
        self.forbidden = model.shard.columns_of(ids, self.device) if model.post_process else None
        # Shifted logits: the hidden state before each block, as it was last computed clean.
        self.carry = torch.zeros(slots, model.shape.hidden, dtype=dtype, device=self.device)
        self.flops, self.launches, self.busy_slots = 0.0, 0, 0

    def run(self) -> Rollout:
        """Admit, denoise and retire, group by group, until every request has its trajectory, or
        until told to stop.
        """
        table = self.table
        flights: list[_Flight | None] = [None] * len(self.groups)
        while self._goes_on():
            for number, group in enumerate(self.groups):
                flight = flights[number]
                if flight is not None:
                    self._land(flight)
                    for trajectory in table.retire(group):
                        self.finished(trajectory)
                flights[number] = self._next_flight(group)
        for flight in flights:  # only where it was told to stop
            if flight is not None:
                self._land(flight)
        slots = len(table.request)
        passes = self.launches / len(self.groups)
        return Rollout(
            trajectories=[table.finished[i] for i in sorted(table.finished)],
            complete=not self.stopped,
            flops=self.flops,
            slots=slots,
            slot_utilisation=self.busy_slots / max(passes * slots, 1),
        )

    def _goes_on(self) -> bool:
        """Whether there is another round: for the ranks that keep step, while one of them works."""
        works = not self.table.done and not self.stopped
        return parallel.most_over_experts(int(works)) > 0

    def _next_flight(self, group: Tensor) -> _Flight | None:
        if not self.stopped:
            self.table.admit(group)
        active = self.table.active(group)
        if len(active) and not self.stopped:
            return self._launch(group, active)
        return self._keep_step() if self.keeps_step else None

    def _keep_step(self) -> _Flight:
        """A forward that nobody reads: one masked block in the scratch slot."""
        self.launches += 1
        size = self.rules.block_size
        tokens, nothing = torch.full((size,), self.table.vocabulary.mask_id), torch.tensor([0])
        length, scratch = torch.tensor([size]), len(self.table.request)
        windows = Windows(tokens, torch.arange(size), length, nothing, nothing, length)
        span = range(scratch, scratch + 1)
        read = torch.zeros(0, dtype=torch.int64)
        _, activations = self._forward(torch.tensor([scratch]), windows, read, span)
        return _Flight(masked=None, drawn=None, activations=activations)

    def _launch(self, group: Tensor, active: Tensor) -> _Flight:
        """Forward of a group through this rank's stage; the last stage draws and sends."""
        activity.advance()
        self.launches += 1
        self.busy_slots += len(active)
        masked, windows = self.table.masked(active), self.table.windows(active)
        read, span = self._read(windows, masked), range(int(group[0]), int(group[-1]) + 1)
        output, activations = self._forward(active, windows, read, span)
        drawn = torch.zeros(3, len(masked.row) + 1, dtype=torch.float64, device=self.device)
        drawn[:, -1] = self.stop()
        if output is not None:
            drawn[:, :-1] = self._draw(output, masked)
        sending = parallel.broadcast_from_last_stage(drawn)
        return _Flight(masked=masked, drawn=sending, activations=activations)

    def _land(self, flight: _Flight) -> None:
        """Receive a group's drawn tokens (the one device synchronisation of a pass) and commit.

        Raises RunError, on every rank of the replica, where nothing could be drawn.
        """
        if flight.activations is not None:
            flight.activations.wait()
        if flight.masked is None or flight.drawn is None:
            return
        drawn = flight.drawn.wait().cpu()
        self.stopped = self.stopped or bool(drawn[0, -1])
        token, confidence, entropy = drawn[:, :-1]
        self._check_drawn(token, confidence, flight.masked)
        self.table.commit(flight.masked, denoising.Draw(token.long(), confidence, entropy))

    def _check_drawn(self, token: Tensor, confidence: Tensor, masked: Masked) -> None:
        """A logit that is not finite leaves no probability, or no token, to draw."""
        faulty = ~(confidence.isfinite() & (token < self.table.vocabulary.size))
        if bool(faulty.any()):
            place = int(torch.nonzero(faulty)[0])
            sample = int(self.table.sample[masked.active[masked.row[place]]])
            raise RunError(
                f"the student's logits for sample {sample}, position "
                f"{int(masked.position[place])}, are not finite in the rollout; nothing was "
                "updated: check the weights, model.dtype and optimizer.lr"
            )

    def _draw(self, hidden_MH: Tensor, masked: Masked) -> Tensor:
        """Draw a token at every masked position -> [3, M] token, confidence, entropy."""
        model, slot = self.model, masked.active[masked.row]
        if self.rules.logit_shift:
            hidden_MH = self._carry(hidden_MH, slot, masked.column)
        logits = project(hidden_MH, model.head_weight, model.shard, self.forbidden)
        keys = (*self.key, self.table.sample[slot], masked.position, self.table.pass_index[slot])
        uniform = randomness.uniform(*keys, randomness.DRAW_TOKEN)
        drawn = denoising.draw(
            logits,
            uniform.to(self.device),
            temperature=self.rules.temperature,
            top_k=self.rules.top_k,
            top_p=self.rules.top_p,
            with_entropy=self.rules.remasking == "entropy_bounded",
            shard=model.shard,
        )
        return torch.stack([drawn.token.double(), drawn.confidence, drawn.entropy])

    def _read(self, windows: Windows, masked: Masked) -> Tensor:
        """Packed tokens [M] whose hidden states predict the masked positions, on the host: the
        positions themselves, with shifted logits those before.
        """
        place = windows.first[masked.row] + masked.position - windows.start[masked.row]
        return (place - 1).clamp(min=0) if self.rules.logit_shift else place

    def _carry(self, hidden_MH: Tensor, slot: Tensor, column: Tensor) -> Tensor:
        """Shifted logits: a block's first position is read from the last one before the block as it
        was last computed clean, which is in the window of the block's first pass and carried from
        then on.
        """
        opens = column == 0
        computed = torch.nonzero(opens & (self.table.pass_index[slot] == 0)).flatten()
        self.carry[slot[computed].to(self.device)] = hidden_MH[computed.to(self.device)]
        opens, slot = opens.to(self.device), slot.to(self.device)
        return torch.where(opens[:, None], self.carry[slot], hidden_MH)

    def _forward(
        self, active: Tensor, windows: Windows, read_M: Tensor, span: range
    ) -> tuple[Tensor | None, parallel.Sending | None]:
        """Run all windows through this rank's stage: final hidden states [M, H] of what predicts
        the masked positions on the last stage, activations on their way on the others.
        """
        model = self.model
        prepared = self.forward.prepare(active, windows, read_M, span)
        self.flops += forward_flops(
            model.shape,
            tokens=prepared.tokens,
            read_rows=prepared.read_rows or prepared.tokens,  # all go on where none is read
            attended_pairs=prepared.attended_pairs,
            projected_rows=len(read_M),
        )
        activations = None
        if not parallel.is_first_stage():
            shape = (prepared.tokens, 1, model.shape.hidden)
            dtype = model.config.params_dtype
            activations = parallel.receive_from_previous_stage(shape, dtype, self.device)
        output = prepared.run(activations)
        if parallel.is_last_stage():
            return output.flatten(0, 1), None
        return None, parallel.send_to_next_stage(output)
