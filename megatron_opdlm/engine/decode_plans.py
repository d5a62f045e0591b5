"""What attention is told about a pass: its windows as they are, in buckets of similar length (the
fastest on a CPU), or as rows of one block each (``model/decode_attention.py``), whose shapes do not
depend on the windows.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron_opdlm.engine.slot_state import Rows, SlotState
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import cached_plan
from megatron_opdlm.model.decode_attention import BlockRows, RowKernel
from megatron_opdlm.model.kv_cache import KVCache


class DecodePlans(Protocol):
    """Makes the plan of a pass of one group."""

    def plan(self, rows: Rows, read: Tensor | None) -> AttentionPlan:
        """``read``: tokens of the rows whose final hidden states are wanted (None: all)."""
        ...


class RowPlans:
    """Block rows over pages of the cache."""

    def __init__(self, cache: KVCache, table: Tensor, block_size: int, kernel: RowKernel) -> None:
        """``table`` int32 [S + 1, pages of a slot]; it changes in place."""
        self.cache, self.table, self.block_size, self.kernel = cache, table, block_size, kernel

    def plan(self, rows: Rows, read: Tensor | None) -> AttentionPlan:
        size, page = self.block_size, self.cache.page_tokens
        slot_N = torch.repeat_interleave(rows.slot_R, size, output_size=len(rows.tokens_N))
        pages = self.table[slot_N, rows.position_N // page]
        return AttentionPlan(
            qkv_format="sbhd",
            rows=BlockRows(
                slot=rows.slot_R.int(),
                visible=(rows.start_R + size).int(),
                table=self.table,
                block_size=size,
                kernel=self.kernel,
            ),
            cache=self.cache,
            cache_place=pages.long() * page + rows.position_N % page,
            read=read,
        )


class BucketPlans:
    """Windows by length, over a cache with one page a slot, where the device is the host."""

    def __init__(self, cache: KVCache, table: Tensor, state: SlotState, pages: range) -> None:
        """``pages``: of the group, its scratch page the last."""
        self.cache, self.table, self.state, self.pages = cache, table, state, pages

    def plan(self, rows: Rows, read: Tensor | None) -> AttentionPlan:
        state, size = self.state, self.state.rules.block_size
        active = torch.nonzero(state.now.runs).flatten()
        page, span = self.table[active, 0].long(), self.pages[:-1]
        rows_of = state.now.rows[active]
        lengths, end = rows_of * size, (state.clean[active] + rows_of) * size
        if not len(active):  # a pass that only keeps step: one row in the scratch slot
            span = self.pages[-1:]
            page, lengths, end = (torch.tensor([n]) for n in (span.start, size, size))
        return cached_plan(
            lengths,
            page,
            rows.position_N,
            end,
            size,
            self.cache,
            self.cache.device,
            span=span,
            read=read,
        )
