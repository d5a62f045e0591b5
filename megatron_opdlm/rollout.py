"""Rollout engine: the student module itself generates, block by block, over slots of one KV cache.

Every forward takes, for each active slot, the *window* of tokens that are not final in the cache
yet: [finished block | fresh block] in the first pass of a block, [fresh block] in the others,
[whole prompt | fresh block] right after admission. So a block costs T forwards: committing it
shares a forward with the next block's first pass, and so does prefill. Sequences enter and leave as
they finish. Autoregressive decoding is the case B = 1 with shifted logits.

What is drawn, committed and ended is decided on the device (``engine/slot_state.py``). Where a
device works beside its host, the report of a pass is read while the next one runs; the host decides
who enters (``engine/slots.py``).

With pipeline stages the slots form as many groups as there are stages; while one group's drawn
tokens travel back from the last stage, the other groups keep the stages busy.

Ranks that share out experts trade tokens in every layer, so they keep step: each round every one of
them runs a forward of each group, with one row in a scratch slot where it has no work, and all stop
after the round that finds none of them at work.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine import slot_state
from megatron_opdlm.engine.cache_budget import room_for
from megatron_opdlm.engine.decoder import Decoder, DecoderKeeper, Group
from megatron_opdlm.engine.pages import Pages
from megatron_opdlm.engine.passes import FixedPasses, Flight
from megatron_opdlm.engine.slots import Queue, Request, SlotBooks, split_over_replicas
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.decode_choice import choose_decode_attention
from megatron_opdlm.model.decode_products import laid_out_weights
from megatron_opdlm.model.flops import forward_flops
from megatron_opdlm.model.gpt import LanguageModel, without_sequence_parallel
from megatron_opdlm.records import Block, Rollout, Trajectory, Vocabulary
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
    committed: Callable[[Block], None] | None = None,
    keeper: DecoderKeeper | None = None,
) -> Rollout:
    """Share the requests out over all copies of the model, ``generate``, gather: trajectories are
    in the order of the requests, on every rank; a copy without work is legal. Not complete, and
    without trajectories, where any copy was told to stop. ``close``: called when this rank's copy
    has made its share. ``committed``: given the blocks that this rank's copy makes.
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
        committed=committed,
        keeper=keeper,
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
    committed: Callable[[Block], None] | None = None,
    keeper: DecoderKeeper | None = None,
) -> Rollout:
    """Generate this model replica's requests; trajectories are in their order and the same on all
    its ranks.

    ``key`` = (seed, step): with the sample's number it decides every random draw, so a response
    depends neither on its batch nor on the layout. Requests that do not fit the budgets of
    ``options`` wait. ``stop``: asked after every forward on the rank that draws; True ends the call
    early on all ranks of the replica. ``finished``: given each trajectory as it ends.
    ``committed``: given each block of a response when it is known to be finished, in order.
    ``keeper``: given to several calls with a ``kv_cache_tokens``, it keeps the cache and what was
    captured.

    Raises RunError for a cache that cannot hold the longest request (other replicas may not find
    it), InputError for an empty prompt where logits are read from the position before.
    """
    if not requests and parallel.expert_size() == 1:
        return Rollout(trajectories=[], flops=0.0)
    rules = decoding if decoding.mode == "diffusion" else decoding.autoregressive()
    _check_prompts(requests, rules)
    way = choose_decode_attention(
        options.attention, model.config.params_dtype, model.shape.head_dim, select_hardware()
    )
    # How many tokens an expert gets is known on the way only, so nothing is captured.
    graphs = options.graphs and way.kernel is not None and model.shape.experts is None
    captures = select_hardware().captures if graphs else None
    room = room_for(
        model,
        paged=way.kernel is not None,
        slots=min(options.slots, len(requests)),
        positions=max((r.positions(rules.block_size) for r in requests), default=rules.block_size),
        kv_cache_tokens=options.kv_cache_tokens,
    )
    keeper = keeper or DecoderKeeper()
    queue = Queue(requests, rules, vocabulary, key, options.prefill_tokens)
    was_training = model.training
    model.eval()
    try:
        with without_sequence_parallel(model), laid_out_weights(model):
            decoder = keeper.take(model, rules, vocabulary, room, way.kernel, captures)
            made = _Engine(decoder, queue, stop, finished, committed).run()
    finally:
        model.train(was_training)
    if options.kv_cache_tokens is not None:
        keeper.keep(decoder)
    return made


def _check_prompts(requests: Sequence[Request], rules: Decoding) -> None:
    for request in requests:
        if rules.logit_shift and not request.prompt.ids:
            raise InputError(
                f"prompt {request.prompt.index} is empty: with mode=ar or "
                "loss.logit_shift=true its first token has no position to be predicted from; "
                "give at least one prompt token"
            )


@dataclass(kw_only=True)
class _Group:
    """Slots that run together: the device's part, the books, and what is under way."""

    device: Group
    books: SlotBooks
    flight: Flight | None = None  # its drawn tokens are not committed yet
    # Reports that are on their way or not entered yet.
    reports: deque[tuple[Flight, Callable[[], Tensor]]] = field(default_factory=deque)
    rows: int = 0  # what the next pass needs, as far as the reports that are in say
    draws: int = 0


class _Engine:
    """Runs a decoder until a queue is empty."""

    def __init__(
        self,
        decoder: Decoder,
        queue: Queue,
        stop: Callable[[], bool],
        finished: Callable[[Trajectory], None],
        committed: Callable[[Block], None] | None,
    ) -> None:
        self.committed = committed
        self.model, self.queue, self.stop, self.finished = decoder.model, queue, stop, finished
        self.keeps_step = parallel.expert_size() > 1
        self.room = decoder.room
        self.groups = [self._group(one) for one in decoder.groups]
        self.stopped = False
        self.launches, self.busy_slots = 0, 0
        self.tokens, self.read_rows, self.pairs, self.projected_rows = 0, 0, 0, 0

    def _group(self, group: Group) -> _Group:
        room, slots = self.room, group.state.slots
        group.state.begin(self.queue.rules.threshold)
        pages = Pages(group.pages, slots, room.page_tokens, room.positions)
        ahead = 1 + group.passes.lag
        books = SlotBooks(self.queue, slots, room.positions, pages, ahead, self.committed)
        return _Group(device=group, books=books)

    def run(self) -> Rollout:
        """Admit, denoise and retire, group by group, until every request has its trajectory, or
        until told to stop.
        """
        while self._goes_on():
            for group in self.groups:
                self._land(group)
                self._learn(group, group.device.passes.lag)
                self._launch(group)
        for group in self.groups:
            self._land(group)
            self._learn(group, 0)
        finished = self.queue.finished
        passes = self.launches / len(self.groups)
        return Rollout(
            trajectories=[finished[i] for i in sorted(finished)],
            complete=not self.stopped,
            flops=self._flops(),
            slots=self.room.slots,
            slot_utilisation=self.busy_slots / max(passes * self.room.slots, 1),
        )

    def _goes_on(self) -> bool:
        """Whether there is another round: for the ranks that keep step, while one of them works."""
        works = not self.queue.done and not self.stopped
        if not self.keeps_step:
            return works
        return parallel.most_over_experts(int(works)) > 0

    def _launch(self, group: _Group) -> None:
        """Fill free slots and run a pass of a group through this rank's stage."""
        books, device = group.books, group.device
        if self.stopped:
            device.state.block.fill_(slot_state.NOWHERE)
        else:
            self._change_slots(group)
        if not self.keeps_step and (self.stopped or not books.active):
            return
        activity.advance()
        passes, stop = device.passes, self.stop()
        if isinstance(passes, FixedPasses):
            group.flight = passes.launch(group.rows, group.draws, stop)
        else:
            group.flight = passes.launch(stop, keep_step=self.keeps_step)
        self.launches += group.flight is not None

    def _change_slots(self, group: _Group) -> None:
        """Who leaves, who gets more pages, who enters: on the books, then on the device."""
        books, device, upload = group.books, group.device, select_hardware().upload
        left = books.make_room()
        admission = None if left else books.admit()
        if left:
            slots = upload(torch.tensor(left))
            device.state.block.index_fill_(0, slots, slot_state.NOWHERE)
            for flight in (group.flight, *(flight for flight, _ in group.reports)):
                if flight is not None:
                    flight.ignored.update(left)
        if admission is not None:
            tensors = (admission.slots, admission.numbers, admission.tokens, admission.committed)
            device.state.admit(*(upload(tensor) for tensor in tensors))
            group.rows += admission.rows
            group.draws += admission.draws
        if books.pages.changed:
            books.pages.changed = False
            device.table.copy_(upload(torch.from_numpy(books.pages.table)))
            device.state.covered.copy_(upload(torch.from_numpy(books.covered)))

    def _land(self, group: _Group) -> None:
        """Commit a group's drawn tokens and send for the report."""
        flight, group.flight = group.flight, None
        if flight is None:
            return
        if flight.activations is not None:
            flight.activations.wait()
        report = group.device.passes.commit(flight)
        group.reports.append((flight, select_hardware().fetch(report)))

    def _learn(self, group: _Group, lag: int) -> None:
        """Enter the reports on the books, all but the last ``lag``.

        Raises RunError, on every rank of the replica, where nothing could be drawn.
        """
        header_size, state = group.device.passes.header, group.device.state
        while len(group.reports) > lag:
            flight, fetched = group.reports.popleft()
            numbers = fetched().numpy()
            header, report = numbers[:header_size].tolist(), numbers[header_size:]
            report = report.reshape(-1, slot_state.report_width(state.rules))
            self._check(group, header[slot_state.FAULTY])
            self.stopped = self.stopped or bool(header[slot_state.STOP])
            pairs = flight.pairs
            if pairs is None:
                padding = flight.rows - header[slot_state.ROWS_RUN]
                pairs = header[slot_state.PAIRS] + padding * state.rules.block_size**2
                group.rows, group.draws = header[slot_state.ROWS :]
            self.tokens += flight.rows * state.rules.block_size
            self.read_rows += flight.read_rows
            self.pairs += pairs
            self.projected_rows += flight.draws
            self.busy_slots += int(np.count_nonzero(report[:, slot_state.RAN]))
            if flight.ignored:
                report[list(flight.ignored)] = 0
            for trajectory in group.books.learn(report):
                self.finished(trajectory)

    def _check(self, group: _Group, faulty: int) -> None:
        """A logit that is not finite leaves no probability, or no token, to draw."""
        books = group.books
        slot, column = divmod(faulty, self.queue.rules.block_size)
        if slot < len(books.request):
            sample = self.queue.requests[int(books.request[slot])].sample
            raise RunError(
                f"the student's logits for sample {sample}, position "
                f"{books.block_start[slot] + column}, are not finite in the rollout; nothing was "
                "updated: check the weights, model.dtype and optimizer.lr"
            )

    def _flops(self) -> float:
        return forward_flops(
            self.model.shape,
            tokens=self.tokens,
            read_rows=self.read_rows,
            attended_pairs=self.pairs,
            projected_rows=self.projected_rows,
        )
