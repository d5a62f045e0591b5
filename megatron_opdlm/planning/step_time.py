"""Seconds of a training step by phase, from what it computes, reads and sends.

A phase takes as long as the slowest of what it does at once: operations, or reads of the memory, or
starts of kernels; what it sends comes on top. Rates are those of ``accelerators.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_opdlm.planning.accelerators import Accelerator, Efficiency
from megatron_opdlm.planning.rank_memory import GRADIENT_BYTES, Split

# Assumed, not measured: what a layer costs the host where its kernels are started one by one, and
# the device where a captured graph starts them; what a message between ranks costs beside what it
# holds.
LAUNCH_SECONDS, REPLAY_SECONDS, MESSAGE_SECONDS = 200e-6, 40e-6, 15e-6
DISK_BYTES = 2e9  # a second and machine, where a run waits for its saves
PHASES = ("rollout", "teacher", "update", "save")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for."""

    gpu: Accelerator
    efficiency: Efficiency
    per_node: int  # GPUs of a machine

    def link(self, ranks: int) -> float:
        """Bytes a second and direction between so many GPUs that are neighbours."""
        wire = self.gpu.link if ranks <= self.per_node else self.gpu.network
        return wire * self.efficiency.link

    @property
    def read(self) -> float:
        """Bytes of its memory that a GPU reads or writes in a second."""
        return self.gpu.bandwidth * self.efficiency.bandwidth

    @property
    def host(self) -> float:
        return self.gpu.host * self.efficiency.link


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """What sequences cost one of the models, whole, in operations."""

    layers: int
    hidden: int
    item: int  # bytes of an activation
    flops: float  # of one sequence of mean length
    tokens: float  # of it, through the layers


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One replica's rollout. The model is whole; what is read is what one of its ranks reads."""

    passes: float  # forwards, one after the other
    flops: float  # of all of them
    weight_bytes: float  # that a pass reads, over all stages
    cache_bytes: float  # keys and values that the mean pass reads, over all stages
    layers: int
    pass_bytes: float  # activations that a layer of a tensor rank sends in the mean pass


@dataclass(frozen=True, kw_only=True)
class Update:
    """The updates of a step."""

    number: int
    forwards: int  # of the layers, the one that recomputes included
    sequences: float  # of a replica in one update
    longest: float  # times the mean: what the slowest replica has to do
    rows: float  # packed rows of a replica in one update
    weights: float  # numbers on a rank
    weight_bytes: float  # of them
    state_bytes: float  # of the optimizer, that a rank keeps


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What moves between device and host, bytes of a rank in a step."""

    to_host: float  # each step, there and back
    saved: float  # of a checkpoint
    save_every: int  # steps
    waits_for_disk: bool


def rollout_seconds(decoding: Decoding, split: Split, machine: Machine) -> float:
    d, gpu = decoding, machine.gpu
    computes = d.flops / split.tensor / (gpu.flops * machine.efficiency.rollout)
    reads = d.passes * (d.weight_bytes + d.cache_bytes) / machine.read
    starts = d.passes * d.layers * REPLAY_SECONDS
    sends = 0.0
    if split.tensor > 1:
        each = d.pass_bytes * _ring(split.tensor) / machine.link(split.tensor) + MESSAGE_SECONDS
        sends += 2 * d.passes * d.layers * each
    if split.expert > 1:
        sends += 2 * d.passes * d.layers * MESSAGE_SECONDS
    return max(computes, reads, starts) + sends


def teacher_seconds(
    work: ModelWork, split: Split, machine: Machine, *, sequences: float, rows: float
) -> float:
    """``sequences`` and packed ``rows`` of a replica."""
    ranks = split.tensor * split.pipeline * split.context
    computes = sequences * work.flops / ranks / (machine.gpu.flops * machine.efficiency.teacher)
    starts = rows * work.layers / split.pipeline * LAUNCH_SECONDS
    bubble = _bubble(split, rows)
    sends = _layer_traffic(work, split, machine, forwards=1, backwards=0) * sequences
    return (max(computes, starts) + sends) * bubble


def update_seconds(work: ModelWork, update: Update, split: Split, machine: Machine) -> float:
    u, ranks = update, split.tensor * split.pipeline * split.context
    flops = u.sequences * u.longest * work.flops / ranks
    computes = flops / (machine.gpu.flops * machine.efficiency.update)
    starts = u.rows * work.layers / split.pipeline * (u.forwards + 2) * LAUNCH_SECONDS
    sends = _layer_traffic(work, split, machine, forwards=u.forwards, backwards=1)
    layers = (max(computes, starts) + sends * u.sequences * u.longest) * _bubble(split, u.rows)
    copies = split.data * split.context
    reduces = 0.0
    if copies > 1:
        sent = GRADIENT_BYTES * u.weights + u.weight_bytes
        reduces = sent * (copies - 1) / copies / machine.link(copies * split.tensor)
    # Gradients are set to zero, summed and measured; the optimizer reads and writes its state.
    touched = 3 * GRADIENT_BYTES * u.weights + u.weight_bytes
    steps = (touched + 2 * u.state_bytes) / machine.read
    return u.number * (layers + reduces + steps)


def save_seconds(kept: Kept, machine: Machine) -> float:
    """Of a mean step, what the run waits for: copies to host memory, and the disk if it is asked
    to.
    """
    save = kept.saved / machine.host
    if kept.waits_for_disk:
        save += kept.saved * machine.per_node / DISK_BYTES
    return save / kept.save_every + 2 * kept.to_host / machine.host


def _ring(ranks: int) -> float:
    """Of a message's bytes, what each rank sends in an all-reduce."""
    return 2 * (ranks - 1) / ranks


def _bubble(split: Split, rows: float) -> float:
    """How much longer a pipeline takes than its fullest stage works."""
    return 1 + (split.pipeline - 1) / max(rows, 1.0)


def _layer_traffic(
    work: ModelWork, split: Split, machine: Machine, *, forwards: int, backwards: int
) -> float:
    """Seconds that the layers of a stage send for one sequence: all-reduces of tensor ranks, two a
    layer and direction, and all-to-alls of context ranks.
    """
    tokens, passes = work.tokens / split.context, forwards + backwards
    row = tokens * work.hidden * work.item
    seconds = 0.0
    if split.tensor > 1:
        seconds += 2 * passes * row * _ring(split.tensor) / machine.link(split.tensor)
    if split.context > 1:
        # Queries, keys and values go there, outputs come back: about four times the hidden size.
        ranks = split.context * split.tensor
        part = (split.context - 1) / split.context / split.tensor
        seconds += 4 * passes * row * part / machine.link(ranks)
    return seconds * work.layers / split.pipeline


def total(seconds: Mapping[str, float]) -> float:
    return sum(seconds[phase] for phase in PHASES)
