"""Backend ``dense``: scaled dot-product attention with a materialised mask.

A packed row [N tokens] is attended in *buckets*: short sequences of similar length gathered to rows
[n, L], each with its own small mask, so the cost is that of the sequences and not of the N x N
square. A longer sequence is attended in *chunks* of queries, each with the keys that some query of
it sees: of a two-stream sequence little more than a quarter of the pairs is visible.
Decoding on a CPU uses buckets as well, with keys from the cache.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.masks import block_causal_visible
from megatron_opdlm.model.packed_row import PackedRow

WASTE = 0.25  # share of a bucket's row that padding to its longest sequence may take
CHUNK = 64  # queries of a long sequence that are attended together; a pair costs the same in 256
LONG = 3 * CHUNK  # tokens; from here on more calls cost less than pairs that are hidden


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sequences that are attended together."""

    gather: Tensor  # [n, L] into the packed row; beyond a sequence's end its first token repeats
    # [n, 1, L or 1, keys] bool, True = may attend; or what is added to the scores. 1: all queries
    # see the same.
    mask: Tensor
    # Cache slots of the n sequences: [n], or a run of neighbours, whose keys are read in place.
    slots: Tensor | slice | None = None

    def to(self, device: torch.device) -> "Bucket":
        """The same on a device."""
        slots = self.slots.to(device) if isinstance(self.slots, Tensor) else self.slots
        return Bucket(gather=self.gather.to(device), mask=self.mask.to(device), slots=slots)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Neighbouring queries of a long sequence, and every key that one of them sees."""

    queries: slice  # L packed tokens
    keys: tuple[slice, ...]  # K packed tokens in all, as runs of neighbours
    mask: Tensor  # bool [1, 1, L, K]


@dataclass(frozen=True, kw_only=True)
class Bucketed:
    """A packed row as buckets and chunks."""

    buckets: tuple[Bucket, ...]
    # [N] place of each packed token among the flattened rows of all buckets and then all chunks.
    scatter: Tensor
    chunks: tuple[Chunk, ...] = ()


# Query [n, L, heads, d], key and value [n, keys, groups, d] and mask -> [n, L, heads, d].
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float | None = None
) -> Tensor:
    """Grouped-query attention of one bucket by PyTorch's kernel."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def attend_bucketed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bucketed: Bucketed,
    kernel: Kernel,
    *,
    read: Tensor | None = None,
    cached: Callable[[Bucket], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """query [N, heads, d], key and value [N, groups, d] -> [N, heads, d]; ``read``: only these
    packed tokens. ``cached`` gives a bucket's keys and values where they come from a cache.
    """
    rows = []
    for bucket in bucketed.buckets:
        q = _gather(query, bucket.gather)
        if cached is None:
            k, v = _gather(key, bucket.gather), _gather(value, bucket.gather)
        else:
            k, v = cached(bucket)
        rows.append(kernel(q, k, v, bucket.mask).flatten(0, 1))
    for chunk in bucketed.chunks:
        k, v = (runs_of(x, chunk.keys)[None] for x in (key, value))
        rows.append(kernel(query[chunk.queries][None], k, v, chunk.mask).flatten(0, 1))
    place = bucketed.scatter if read is None else bucketed.scatter[read]
    flat = rows[0] if len(rows) == 1 else torch.cat(rows)
    return flat.index_select(0, place)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [N, heads, d] at index [n, L] -> [n, L, heads, d]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def runs_of(x: Tensor, runs: Sequence[slice]) -> Tensor:
    """Rows of x, of one run without a copy."""
    return x[runs[0]] if len(runs) == 1 else torch.cat([x[run] for run in runs])


def group_bounds(lengths: Tensor, waste: float = WASTE) -> list[tuple[int, int]]:
    """(shortest, longest) length of each bucket, longest bucket first.

    The loop runs over buckets: their number grows with the logarithm of the spread of lengths.
    """
    bounds: list[tuple[int, int]] = []
    left = lengths.unique()
    while len(left):
        longest = int(left[-1])
        inside = left >= (1 - waste) * longest
        bounds.append((int(left[inside][0]), longest))
        left = left[~inside]
    return bounds


def packed_pairs(row: PackedRow, *, chunked: bool = True) -> int:
    """(query, key) pairs that the buckets of a packed row compute, hidden ones included."""
    lengths = torch.tensor(row.lengths)
    short = lengths[lengths < LONG] if chunked else lengths
    pairs = sum(
        int(((short >= shortest) & (short <= longest)).sum()) * longest**2
        for shortest, longest in group_bounds(short)
    )
    if not chunked:
        return pairs
    return pairs + sum(chunk.mask.numel() for chunk in _all_chunks(row))


class _Rows(NamedTuple):
    """Sequences of similar length."""

    members: Tensor  # [n] which packed sequences
    gather: Tensor  # [n, L] indices into the packed row; beyond a sequence's end its first token
    real: Tensor  # bool [n, L]


def _bucket_rows(lengths: Tensor, chosen: Tensor, tokens: int) -> tuple[list[_Rows], Tensor]:
    """Buckets of the packed sequences that are ``chosen`` (bool), and each of their tokens' place
    among the buckets' flattened rows.

    ``tokens`` may exceed the sum of lengths: the alignment tail reads place 0, and nobody reads it.
    """
    starts = lengths.cumsum(0) - lengths
    scatter = torch.zeros(tokens, dtype=torch.int64)
    rows: list[_Rows] = []
    base = 0
    for shortest, longest in group_bounds(lengths[chosen]):
        inside = chosen & (lengths >= shortest) & (lengths <= longest)
        members = torch.nonzero(inside).flatten()
        offset = torch.arange(longest)
        real = offset < lengths[members, None]
        gather = starts[members, None] + torch.where(real, offset, 0)
        scatter[gather[real]] = base + torch.arange(gather.numel())[real.flatten()]
        base += gather.numel()
        rows.append(_Rows(members, gather, real))
    return rows, scatter


def bucketed(row: PackedRow, *, chunked: bool = True) -> Bucketed:
    """The row's buckets with boolean masks. ``chunked`` False: no sequence is cut into chunks."""
    lengths = torch.tensor(row.lengths)
    is_short = lengths < LONG if chunked else torch.ones_like(lengths, dtype=torch.bool)
    rows, scatter = _bucket_rows(lengths, is_short, row.tokens)
    make = _causal_bucket if row.causal else _two_stream_bucket
    buckets = [make(row, one) for one in rows]
    base = sum(bucket.gather.numel() for bucket in buckets)
    chunks = tuple(_all_chunks(row)) if chunked else ()
    for chunk in chunks:
        count = chunk.queries.stop - chunk.queries.start
        scatter[chunk.queries] = base + torch.arange(count)
        base += count
    return Bucketed(buckets=tuple(buckets), scatter=scatter.to(row.device), chunks=chunks)


def _all_chunks(row: PackedRow) -> Iterator[Chunk]:
    """Chunks of all sequences from ``LONG`` tokens on."""
    starts = itertools.accumulate(row.lengths, initial=0)
    for start, length in zip(starts, row.lengths, strict=False):
        if length >= LONG:
            yield from _chunks(row, start, start + length)


def _chunks(row: PackedRow, start: int, stop: int) -> Iterator[Chunk]:
    """The sequence of the packed tokens ``start`` to ``stop``."""
    place = torch.arange(start, stop)
    for first in range(start, stop, CHUNK):
        queries = slice(first, min(first + CHUNK, stop))
        visible = row.visible(torch.arange(queries.start, queries.stop)[:, None], place[None, :])
        seen = visible.any(dim=0)
        edges = torch.nonzero(F.pad(seen, (1, 1)).diff()).flatten() + start
        mask = visible[:, seen].to(row.device)
        runs = tuple(slice(a, b) for a, b in edges.view(-1, 2).tolist())
        yield Chunk(queries=queries, keys=runs, mask=mask[None, None])


def _causal_bucket(row: PackedRow, rows: _Rows) -> Bucket:
    position = torch.arange(rows.gather.shape[1], device=row.device)
    mask = block_causal_visible(position[:, None], position[None, :], 1)
    expanded = mask.expand(len(rows.members), 1, -1, -1)
    return Bucket(gather=rows.gather.to(row.device), mask=expanded)


def _two_stream_bucket(row: PackedRow, rows: _Rows) -> Bucket:
    mask = row.visible(rows.gather[:, :, None], rows.gather[:, None, :])
    # A place beyond the end repeats the first token, which must not be seen twice.
    mask = (mask & rows.real[:, None, :]).unsqueeze(1)
    return Bucket(gather=rows.gather.to(row.device), mask=mask.to(row.device))
