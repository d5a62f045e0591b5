"""One forward of the rollout engine over this rank's pipeline stage, in two forms.

``BucketForward`` runs the windows as they are, attention in buckets of similar length: the fastest
on a CPU. ``RowForward`` runs them as rows of one block each (``model/decode_attention.py``), padded
to a few sizes, so that a forward of each size can be captured once in a graph and replayed without
launching its kernels one by one: what decoding on a GPU needs. Replaying CUDA graphs has not run
on a GPU yet; the fixed-size forward itself is what the tests run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_opdlm.engine.slots import Windows
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import cached_plan
from megatron_opdlm.model.decode_attention import BlockRows
from megatron_opdlm.model.flops import attended_pairs
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.kv_cache import KVCache

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A forward that only lacks the activations of the stage before."""

    tokens: int  # N that run, padding included
    read_rows: int  # those that the last layer carries on after its attention
    attended_pairs: int
    # Activations [N, 1, H] (None on the first stage) -> final hidden states [M, 1, H] of the tokens
    # that are read on the last stage, activations [N, 1, H] on the others.
    run: Callable[[Tensor | None], Tensor]


class DecodeForward(Protocol):
    """How the engine runs its windows."""

    def prepare(self, active: Tensor, windows: Windows, read_M: Tensor, span: range) -> Prepared:
        """``active`` [n] slots among ``span``; ``read_M`` packed tokens whose final hidden states
        are wanted. All on the host.
        """
        ...


class BucketForward:
    """Packed windows, attention by length."""

    def __init__(self, model: LanguageModel, cache: KVCache, block_size: int) -> None:
        self.model, self.cache, self.block_size = model, cache, block_size

    def prepare(self, active: Tensor, windows: Windows, read_M: Tensor, span: range) -> Prepared:
        device = self.cache.device
        plan = cached_plan(
            windows.lengths,
            active,
            windows.position_N,
            windows.end,
            self.block_size,
            self.cache,
            device,
            span=span,
            read=read_M,
        )
        tokens, position = windows.tokens_N.to(device), windows.position_N.to(device)
        return Prepared(
            tokens=len(tokens),
            read_rows=len(read_M),
            attended_pairs=attended_pairs(plan),
            run=partial(_run, self.model, tokens, position, plan),
        )


def _run(
    model: LanguageModel,
    tokens_N: Tensor,
    position_N: Tensor,
    plan: AttentionPlan,
    activations: Tensor | None,
) -> Tensor:
    if activations is not None:
        model.set_input_tensor(activations)
    return model.run(tokens_N, position_N, plan)


class RowForward:
    """Windows as block rows; ``capture`` None runs every forward kernel by kernel.

    The cache's last slot is scratch: rows that only pad a captured forward work there.
    """

    def __init__(
        self, model: LanguageModel, cache: KVCache, block_size: int, capture: Capture | None
    ) -> None:
        self.model, self.cache, self.block_size = model, cache, block_size
        self.capture = capture
        self.sizes = graph_sizes(2 * cache.slots) if capture else []
        self.graphs: dict[int, _RowGraph] = {}

    def prepare(self, active: Tensor, windows: Windows, read_M: Tensor, span: range) -> Prepared:
        slot_R = torch.repeat_interleave(active, windows.lengths // self.block_size)
        visible_R = windows.position_N[self.block_size - 1 :: self.block_size] + 1
        size = next((size for size in self.sizes if size >= len(slot_R)), None)
        pairs = self.block_size * int(visible_R.sum())
        if size is None:
            return self._eager(windows, slot_R, visible_R, read_M, pairs)
        graph = self._graph(size)
        graph.fill(windows, slot_R, visible_R)
        read = read_M.to(self.cache.device) if self.model.post_process else None
        return Prepared(
            tokens=size * self.block_size,
            read_rows=size * self.block_size,  # how many are wanted differs from pass to pass
            attended_pairs=pairs + (size - len(slot_R)) * self.block_size**2,
            run=partial(graph.run, read),
        )

    def _eager(
        self, windows: Windows, slot_R: Tensor, visible_R: Tensor, read_M: Tensor, pairs: int
    ) -> Prepared:
        device = self.cache.device
        position = windows.position_N.to(device)
        rows = BlockRows(
            slot=slot_R.int().to(device),
            visible=visible_R.int().to(device),
            block_size=self.block_size,
        )
        plan = AttentionPlan(
            qkv_format="sbhd",
            rows=rows,
            cache=self.cache,
            cache_slot=torch.repeat_interleave(slot_R, self.block_size).to(device),
            cache_position=position,
            read=read_M.to(device),
        )
        tokens = windows.tokens_N.to(device)
        run = partial(_run, self.model, tokens, position, plan)
        return Prepared(tokens=len(tokens), read_rows=len(read_M), attended_pairs=pairs, run=run)

    def _graph(self, size: int) -> "_RowGraph":
        if size not in self.graphs:
            assert self.capture is not None
            self.graphs[size] = _RowGraph(
                self.model, self.cache, size, self.block_size, self.capture
            )
        return self.graphs[size]


def graph_sizes(most: int) -> list[int]:
    """Row counts that are captured: powers of two and halfway between them, up to ``most``."""
    sizes = {1} | {factor * 2**power for power in range(1, most.bit_length()) for factor in (2, 3)}
    return [*sorted(size for size in sizes if size < most), most]


class _RowGraph:
    """A captured forward of a fixed number of rows R; its inputs and output stay where they are."""

    def __init__(
        self, model: LanguageModel, cache: KVCache, rows: int, block_size: int, capture: Capture
    ) -> None:
        self.rows, self.block_size, self.scratch = rows, block_size, cache.slots - 1
        tokens, device = rows * block_size, cache.device
        # Token, position and slot of each of the N tokens; slot and visible positions of each row.
        self.inputs = torch.zeros(3, tokens, dtype=torch.int64, device=device)
        self.row_inputs = torch.zeros(2, rows, dtype=torch.int32, device=device)
        shape, dtype = (tokens, 1, model.config.hidden_size), model.config.params_dtype
        self.activations = (
            None if model.pre_process else torch.zeros(shape, dtype=dtype, device=device)
        )
        nothing = torch.zeros(0, dtype=torch.int64)
        self._fill(nothing, nothing, nothing, nothing)
        plan = AttentionPlan(
            qkv_format="sbhd",
            rows=BlockRows(
                slot=self.row_inputs[0], visible=self.row_inputs[1], block_size=block_size
            ),
            cache=cache,
            cache_slot=self.inputs[2],
            cache_position=self.inputs[1],
        )
        self._replay = capture(
            partial(_run, model, self.inputs[0], self.inputs[1], plan, self.activations)
        )

    def fill(self, windows: Windows, slot_R: Tensor, visible_R: Tensor) -> None:
        """Copy a forward's inputs to their places."""
        self._fill(windows.tokens_N, windows.position_N, slot_R, visible_R)

    def _fill(self, tokens: Tensor, position: Tensor, slot_R: Tensor, visible_R: Tensor) -> None:
        """Rows beyond those given work on the first block of the scratch slot. Two copies in all:
        each costs a launch.
        """
        missing = self.rows - len(slot_R)
        slot = torch.cat([slot_R, torch.full((missing,), self.scratch)])
        visible = torch.cat([visible_R, torch.full((missing,), self.block_size)])
        idle = torch.arange(self.block_size).repeat(missing)
        inputs = torch.stack(
            [
                torch.cat([tokens, torch.zeros_like(idle)]),
                torch.cat([position, idle]),
                torch.repeat_interleave(slot, self.block_size),
            ]
        )
        self.inputs.copy_(inputs)
        self.row_inputs.copy_(torch.stack([slot, visible]))

    def run(self, read: Tensor | None, activations: Tensor | None) -> Tensor:
        """Replay; the result is a copy, since the next replay overwrites the graph's own output."""
        if activations is not None:
            assert self.activations is not None
            self.activations.copy_(activations)
        output = self._replay()
        return output.clone() if read is None else output.index_select(0, read)
