"""Attention backends on packed rows against sums written out from the definition of the masks
(DESIGN 2), and whole models through both backends that run on a CPU.

FlexAttention runs uncompiled here, but for the one test marked slow.
"""

import random
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_opdlm.diffusion.masks import TRUNK
from megatron_opdlm.model import flex_attention
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import causal_plan, two_stream_plan
from megatron_opdlm.model.dense_attention import attend, attend_bucketed, bucketed, packed_pairs
from megatron_opdlm.model.flex_attention import (
    TILE,
    attend_flex,
    compiled_kernel,
    flex_mask,
    padded_size,
)
from megatron_opdlm.model.host_attention import attend_row, host_row
from megatron_opdlm.model.kernels import Kernels
from megatron_opdlm.model.mask_tiles import Tokens, Visible, occupied_tiles
from megatron_opdlm.model.packed_row import PackedRow
from megatron_opdlm.model.te_attention import HIDDEN, biased, bounds
from megatron_opdlm.parallel import Layout
from tests.conftest import TinyModels
from tests.distributed import jobs

CPU = torch.device("cpu")
BLOCK = 3  # tokens


@dataclass
class Packed:
    """A row with what each of its tokens is."""

    row: PackedRow
    sequence: list[int]  # of each token; -1 in the tail
    block: list[int]
    noisy: list[bool]
    # Which of a tree's sequences each token belongs to; empty: there is no tree
    owners: list[set[int]] = field(default_factory=list)

    def expected_mask(self) -> Tensor:
        """bool [N, N] pair by pair; tail tokens see themselves, so that rows are never empty."""
        n = self.row.tokens
        return torch.tensor([[self._sees(q, k) for k in range(n)] for q in range(n)])

    def _sees(self, q: int, k: int) -> bool:
        if self.sequence[q] == -1 or self.sequence[q] != self.sequence[k]:
            return q == k
        if self.owners and not self.owners[q] <= self.owners[k]:
            return False
        if self.row.causal:
            return k <= q
        if self.noisy[k]:
            return self.noisy[q] and self.block[k] == self.block[q]
        return self.block[k] < self.block[q] or (
            not self.noisy[q] and self.block[k] == self.block[q]
        )


def two_stream(responses: list[tuple[int, int]], tail: int = 0) -> Packed:
    """Sequences of (clean, noisy) tokens; the noisy copy holds the last positions and those of
    their blocks before it."""
    sequence, position, noisy = [], [], []
    for number, (clean, copied) in enumerate(responses):
        start = max(0, clean - copied) // BLOCK * BLOCK
        stream = [*range(clean), *range(start, start + copied)]
        sequence += [number] * len(stream)
        position += stream
        noisy += [False] * clean + [True] * copied
    sequence += [-1] * tail
    position += [0] * tail
    noisy += [False] * tail
    block = [p // BLOCK for p in position]
    row = PackedRow(
        lengths=tuple(sum(pair) for pair in responses),
        tokens=len(sequence),
        device=CPU,
        block=torch.tensor(block),
        clean=~torch.tensor(noisy),
    )
    return Packed(row, sequence, block, noisy)


def trees(whole: list[tuple[int, list[tuple[int, int]]]], tail: int = 0) -> Packed:
    """Trees of a common beginning and (clean, noisy) tokens of each branch after it."""
    parts, owners = [], []
    for shared, branches in whole:
        assert shared % BLOCK == 0
        parts.append((shared, 0))
        owners += [set(range(len(branches)))] * shared
        for number, (clean, copied) in enumerate(branches):
            parts.append((clean, copied))
            owners += [{number}] * (clean + copied)
    alone = two_stream(parts, tail)
    sequence, block, part = [], [], 0
    for number, (shared, branches) in enumerate(whole):
        for place in range(1 + len(branches)):
            tokens = [i for i, s in enumerate(alone.sequence) if s == part]
            sequence += [number] * len(tokens)
            block += [alone.block[i] + (shared // BLOCK if place else 0) for i in tokens]
            part += 1
    sequence, block, owners = sequence + [-1] * tail, block + [0] * tail, owners + [{0}] * tail
    row = replace(
        alone.row,
        lengths=tuple(sequence.count(number) for number in range(len(whole))),
        block=torch.tensor(block),
        branch=torch.tensor([next(iter(o)) if len(o) == 1 else TRUNK for o in owners]),
    )
    return Packed(row, sequence, block, alone.noisy, owners)


def causal(lengths: list[int], tail: int = 0) -> Packed:
    sequence = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * tail
    row = PackedRow(lengths=tuple(lengths), tokens=len(sequence), device=CPU)
    return Packed(row, sequence, [0] * len(sequence), [False] * len(sequence))


ROWS = {
    "one-token": causal([1]),
    "causal-ragged": causal([37, 5, 61, 1], tail=3),
    "causal-several-tiles": causal([530, 90]),
    "two-stream-ragged": two_stream([(20, 9), (4, 4), (31, 24), (0, 3)], tail=2),
    "two-stream-several-tiles": two_stream([(270, 250), (10, 7)], tail=1),
    "trees-ragged": trees([(9, [(7, 6), (4, 4), (0, 2)]), (0, [(5, 5)]), (3, [(1, 1)] * 2)], 2),
    "trees-several-tiles": trees([(150, [(200, 150), (140, 160)]), (6, [(8, 7)] * 2)], tail=1),
}
EVERY_ROW = pytest.mark.parametrize("packed", ROWS.values(), ids=ROWS)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query of 6 heads, key and value of 2 groups."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(tokens, n, 16, generator=generator) for n in (6, 2, 2))
    return query, key, value


def expected_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[N, heads, d] in float64: head h reads the keys of group h * groups // heads."""
    each = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(each, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) / query.shape[2] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@EVERY_ROW
def test_one_node_for_all_buckets(packed: Packed, dtype: torch.dtype):
    """Claim: what CPUs run gives the values and gradients that autograd gives bucket by bucket, in
    16 bits to rounding."""
    row = packed.row
    weight = torch.randn(row.tokens, 6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[sum(row.lengths) :] = 0  # nobody reads the tail
    given: Any = [x.to(dtype).requires_grad_() for x in inputs(row.tokens)]
    expected_given: Any = [x.detach().double().requires_grad_() for x in given]
    q, k, v = given
    out = attend_row(q, k, v, host_row(row), 0.25)
    q, k, v = expected_given
    expected_out = attend_bucketed(q, k, v, bucketed(row), partial(attend, scale=0.25))
    found = [out, *torch.autograd.grad((out * weight).sum(), given)]
    expected = [
        expected_out,
        *torch.autograd.grad((expected_out * weight.double()).sum(), expected_given),
    ]
    real = sum(row.lengths)
    tolerance: dict[str, Any] = {} if dtype is torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:real], other[:real].to(dtype), **tolerance)


@EVERY_ROW
def test_backends_compute_the_definition(packed: Packed):
    """Claim: dense buckets and FlexAttention give the masked sums of every token of every
    sequence, 3 query heads a group; Transformer Engine's bias gives them through PyTorch's
    kernel."""
    row = packed.row
    query, key, value = inputs(row.tokens)
    expected = expected_attention(query, key, value, packed.expected_mask())
    real = torch.tensor(packed.sequence) >= 0
    found = {
        "dense": attend_bucketed(query, key, value, bucketed(row), attend),
        "flex": attend_flex(query, key, value, flex_mask(row), 16**-0.5),
    }
    for name, one in found.items():
        torch.testing.assert_close(one[real], expected[real], msg=name)
    bias = [bucket.mask for bucket in biased(row).buckets]
    assert all(one.dtype is torch.bfloat16 for one in bias)
    as_mask = [bucket.mask.float() for bucket in biased(row).buckets]
    assert all(bool(((one == 0) | (one < HIDDEN / 2)).all()) for one in as_mask)
    biases = iter(as_mask)
    te = attend_bucketed(
        query,
        key,
        value,
        bucketed(row, chunked=False),
        lambda q, k, v, _: attend(q, k, v, next(biases)),
    )
    torch.testing.assert_close(te[real], expected[real])


@pytest.mark.parametrize("packed", [causal([5, 900, 520]), two_stream([(700, 650), (20, 9)], 3)])
def test_long_sequences_in_chunks(packed: Packed):
    """Claim: chunks of a long sequence's queries give the values and gradients of the whole square,
    from at most 0.7 of its pairs, and the pairs that are counted as work are those computed."""
    row, found = packed.row, []
    weight = torch.randn(row.tokens, 6, 16, generator=torch.Generator().manual_seed(1))
    weight[sum(row.lengths) :] = 0  # nobody reads the tail
    for chunked in (True, False):
        given = [x.requires_grad_() for x in inputs(row.tokens)]
        made = bucketed(row, chunked=chunked)
        out = attend_bucketed(*given, made, attend)
        found.append([out[: sum(row.lengths)], *torch.autograd.grad((out * weight).sum(), given)])
        computed = sum(part.mask.numel() for part in (*made.buckets, *made.chunks))
        assert packed_pairs(row, chunked=chunked) == computed
    torch.testing.assert_close(*found)
    assert packed_pairs(row) <= 0.7 * packed_pairs(row, chunked=False)


@EVERY_ROW
def test_flex_tiles(packed: Packed):
    """Claim: a tile is left out exactly where nobody sees anybody, and unmasked exactly where all
    see all; the mask inside the others is the definition's."""
    mask = flex_mask(packed.row)
    n, tiles = packed.row.tokens, mask.size // TILE
    whole = torch.eye(mask.size, dtype=torch.bool)
    whole[:n, :n] = packed.expected_mask()  # padding sees itself
    by_tile = whole.view(tiles, TILE, tiles, TILE)
    block_mask = mask.block_mask
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), by_tile.any(3).any(1))
    assert block_mask.full_kv_num_blocks is not None
    full = by_tile.all(3).all(1)
    assert torch.equal(block_mask.full_kv_num_blocks[0, 0], full.sum(-1).int())
    index = torch.arange(mask.size)
    none = torch.tensor(0)
    assert torch.equal(block_mask.mask_mod(none, none, index[:, None], index[None]), whole)


def test_several_tiles_have_every_kind():
    """Claim (that the cases above are no empty ones)."""
    for name in ("causal-several-tiles", "two-stream-several-tiles", "trees-several-tiles"):
        mask = flex_mask(ROWS[name].row).block_mask
        tiles = mask.to_dense()[0, 0]
        assert mask.full_kv_num_blocks is not None
        assert bool((tiles == 0).any()) and 0 < int(mask.full_kv_num_blocks.sum()) < tiles.sum()


def test_tiles_do_not_depend_on_how_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch):
    """Claim: long rows are sorted into tiles piece by piece, with the same result."""
    row = two_stream([(700, 240)]).row
    whole = flex_mask(row).block_mask.to_dense()
    monkeypatch.setattr("megatron_opdlm.model.mask_tiles._PAIRS_AT_ONCE", 1)
    assert torch.equal(flex_mask(row).block_mask.to_dense(), whole)


def random_tokens(draw: random.Random, tokens: int) -> Tokens:
    """Sequences of clean and noisy tokens in rising blocks; sometimes in no order at all."""
    document, block, clean = [], [], []
    while len(document) < tokens:
        length, noisy, size = draw.randint(1, 40), draw.randint(0, 20), draw.randint(1, 9)
        start = max(0, length - noisy)
        document += [draw.choice([len(document), -len(document)])] * (length + noisy)
        block += [p // size for p in [*range(length), *range(start, start + noisy)]]
        clean += [True] * length + [False] * noisy
    order = list(range(tokens))
    branch = [draw.choice([TRUNK, 0, 0, 1]) for _ in range(tokens)]
    if draw.random() < 0.6:  # runs, as in a row
        branch = [TRUNK + i * 3 // tokens for i in range(tokens)]
    if draw.random() < 0.3:
        draw.shuffle(order)
    numbers = [document[:tokens], block[:tokens], branch]
    number = torch.tensor(numbers, dtype=torch.int32)[:, order]
    is_clean = torch.tensor(clean)[order]
    return Tokens(document=number[0], block=number[1], clean=is_clean, branch=number[2])


def test_tiles_of_random_rows():
    """Claim: empty, mixed and full tiles are those of the definition pair by pair, whatever the
    tokens are, in tiles so small that every case of the ranges occurs."""
    draw = random.Random(5)
    kinds = torch.zeros(3)
    for _ in range(150):
        tile, count = draw.choice([1, 2, 4, 8]), draw.randint(1, 12)
        tokens = random_tokens(draw, tile * count)

        def visible(q: Tensor, k: Tensor, t: Tokens = tokens) -> Tensor:
            earlier, same = t.block[k] < t.block[q], t.block[k] == t.block[q]
            clean = t.clean[k] & (earlier | (t.clean[q] & same))
            noisy = ~t.clean[k] & ~t.clean[q] & same
            related = (t.branch[k] == TRUNK) | (t.branch[k] == t.branch[q])
            return (t.document[q] == t.document[k]) & related & (clean | noisy)

        index = torch.arange(tile * count)
        pairs = visible(index[:, None], index).view(count, tile, count, tile)
        some, every = occupied_tiles(tokens, visible, tile)
        assert torch.equal(some, pairs.any(3).any(1)) and torch.equal(every, pairs.all(3).all(1))
        kinds += torch.stack([(~some).sum(), (some & ~every).sum(), every.sum()])
    assert bool((kinds > 300).all())


@pytest.mark.parametrize(
    "packed",
    [
        causal([4000, 90, 4000]),
        two_stream([(2500, 2400)] * 2),
        trees([(600, [(900, 900)] * 4), (1500, [(300, 250)] * 2)]),
    ],
)
def test_few_pairs_are_looked_at(packed: Packed, monkeypatch: pytest.MonkeyPatch):
    """Claim: of T x T tiles only a few times T are looked into."""
    looked: list[int] = []

    def counted(tokens: Tokens, visible: Visible, tile: int) -> tuple[Tensor, Tensor]:
        def counting(q: Tensor, k: Tensor) -> Tensor:
            looked.append(max(len(q), len(k)))
            return visible(q, k)

        return occupied_tiles(tokens, counting, tile)

    monkeypatch.setattr(flex_attention, "occupied_tiles", counted)
    tiles = flex_mask(packed.row).size // TILE
    assert sum(looked) <= 5 * tiles


def test_row_sizes_are_few():
    """Claim: any length fits, none is more than doubled beyond the smallest size, and 20,000
    lengths share six sizes."""
    sizes = [padded_size(tokens) for tokens in range(1, 20_001)]
    assert all(tokens <= size < max(2 * tokens, 1025) for tokens, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1024, 2048, 4096, 8192, 16384, 32768]


class Counted:
    """The kernel as a GPU would get it, but traced only, without code being made of it: counts how
    often it is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend("eager")
        kernel = torch.compile(
            flex_attention.flex_attention, dynamic=False, fullgraph=True, backend=self.counter
        )
        monkeypatch.setattr(flex_attention, "compiled_kernel", lambda: kernel)

    @torch.no_grad()
    def attend(self, packed: Packed) -> None:
        mask = flex_mask(packed.row)
        rows = [flex_attention._row(x[:, :2], mask.size) for x in inputs(packed.row.tokens)]
        kernel = flex_attention._kernel(torch.device("meta"))  # any that is no CPU
        kernel(*rows, block_mask=mask.block_mask, scale=0.25, enable_gqa=True)


def test_rows_share_compilations(monkeypatch: pytest.MonkeyPatch):
    """Claim: one compilation for each size and kind of mask, whatever the rows are."""
    counted = Counted(monkeypatch)
    for _ in range(2):
        for length in (5, 300, 1001, 1025, 1400):
            counted.attend(causal([length, 3]))
            counted.attend(two_stream([(length, 9), (7, 4)], tail=2))
    assert counted.counter.frame_count == 2 * 2


def test_compilations_in_another_thread(monkeypatch: pytest.MonkeyPatch):
    """Claim: more sizes than PyTorch's default limit of 8 are compiled in a thread that has never
    been told of another limit, as autograd's are."""
    monkeypatch.setattr(flex_attention, "padded_size", lambda tokens: TILE * (-(-tokens // TILE)))
    counted, problems = Counted(monkeypatch), []

    def attend() -> None:
        try:
            for size in range(10):
                counted.attend(causal([TILE * size + 1]))
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=attend)
    thread.start()
    thread.join(timeout=120)
    assert not problems and counted.counter.frame_count == 10, problems


def test_transformer_engine_bounds():
    """Claim: cumulative lengths in int32 to the end of the row: a tail is a sequence of its own."""
    found = bounds(causal([37, 5, 61], tail=3).row)
    assert found.cumulative.tolist() == [0, 37, 42, 103, 106] and found.longest == 61
    assert found.cumulative.dtype is torch.int32
    assert bounds(causal([4]).row).cumulative.tolist() == [0, 4]


def plans(packed: Packed, read: Tensor | None = None) -> AttentionPlan:
    row = packed.row
    if row.block is None or row.clean is None:
        return causal_plan(row.lengths, row.tokens, CPU, read=read)
    stream = row.block, row.clean, CPU
    return two_stream_plan(row.lengths, *stream, branch_N=row.branch, read=read)


@pytest.mark.parametrize("name", ["causal-ragged", "two-stream-ragged"])
@torch.no_grad()
def test_models_agree(models: TinyModels, name: str):
    """Claim: logits of a whole model through FlexAttention are those through dense attention, for
    the teacher's mask and the student's, all rows and chosen ones."""
    packed = ROWS[name]
    real = (torch.tensor(packed.sequence) >= 0).nonzero().flatten()
    tokens = torch.arange(packed.row.tokens) * 7 % 60
    positions = torch.arange(packed.row.tokens) % 40
    found = {}
    for backend in ("dense", "flex"):
        model = jobs.load(
            Layout(),
            models.hf("student", tied=False, layers=2),
            kernels=Kernels(attention=backend),
        )
        for read in (None, real[::4]):
            hidden = model.run(tokens, positions, plans(packed, read))
            rows = hidden.flatten(0, 1) if read is not None else hidden.flatten(0, 1)[real]
            found[backend, read is None] = torch.from_numpy(jobs.whole_logits(model, rows))
    for whole in (True, False):
        torch.testing.assert_close(
            found["flex", whole], found["dense", whole], atol=1e-4, rtol=1e-4
        )
    assert found["dense", True].std() > 1
    assert torch.equal(found["dense", True][::4], found["dense", False]) or torch.allclose(
        found["dense", True][::4], found["dense", False], atol=1e-4
    )


@pytest.mark.slow
@torch.no_grad()
def test_compiled_kernel_is_shared_by_ragged_rows():
    """Claim: compiled (here to C++), rows of other lengths and other masks of the same padded size
    need no new compilation, and the sums stay those of the uncompiled kernel."""
    counters = torch._dynamo.utils.counters["stats"]
    before = None
    for packed in (two_stream([(20, 9), (4, 4)]), two_stream([(31, 24), (0, 3)], tail=2)):
        row = packed.row
        query, key, value = inputs(row.tokens)
        mask = flex_mask(row)
        padded = [
            torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, mask.size - row.tokens))[None]
            for x in (query, key, value)
        ]
        found = compiled_kernel()(
            *padded, block_mask=mask.block_mask, scale=16**-0.5, enable_gqa=True
        )[0, :, : row.tokens].transpose(0, 1)
        torch.testing.assert_close(found, attend_flex(query, key, value, mask, 16**-0.5))
        assert before is None or counters["unique_graphs"] == before
        before = counters["unique_graphs"]
