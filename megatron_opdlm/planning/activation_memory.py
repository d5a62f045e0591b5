"""What a rank keeps and works with beside weights, gradients and optimizer, in bytes.

Derived from what autograd saves in Megatron's layers with our attention, and held against measured
peaks on a CPU (``tests/distributed/test_memory_peaks.py``).
"""

from dataclasses import dataclass, replace

from megatron_opdlm.divergence import PIECE
from megatron_opdlm.model_files.manifest import LowRank
from megatron_opdlm.model_files.shape import ModelShape, padded_vocab
from megatron_opdlm.planning.rank_memory import Split

FLOAT = 4  # bytes
DENSE_CHUNK = 64  # queries of a long sequence that the dense attention takes together
# Float32 arrays of a chunk's logits that the divergence has at a time; a CPU, which compares them
# piece by piece, has two, and three of a piece.
LOGIT_COPIES, HOST_LOGIT_COPIES, PIECE_COPIES = 3, 2, 3
DRAW_BYTES = 20  # of a drawn token and column: logits, weights, their running sums in float64
# Of an MLP's width: both halves of fc1 and their product; of experts the product once more, before
# it is weighed.
GATE_COPIES = 3
ROUTER_COPIES = 3  # of the number of experts: probabilities, weights, places


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a model is computed, as far as its memory goes."""

    item: int  # bytes of a number of weights and activations
    spec: str = "local"  # "local" | "te": whose layers
    attention: str = "dense"  # "dense" | "flex" | "te"
    on_host: bool = True  # dense attention of a row is one node, logits are compared in pieces
    recompute: str = "false"  # "attention" | "mlp" | "true"
    sequence_parallel: bool = False
    low_rank: LowRank | None = None  # what is trained, beside frozen weights
    # The output weight's gradient is added to the sums as it is made; else autograd brings it.
    sums_head: bool = False

    @property
    def one_node(self) -> bool:
        return self.attention == "dense" and self.on_host


@dataclass(frozen=True, kw_only=True)
class Row:
    """The longest packed row, as one rank of its context group sees it."""

    tokens: float
    positions: float  # that are projected to the vocabulary
    pairs: float = 0.0  # (query, key) pairs that the dense attention computes; 0 with others


class LayerMemory:
    """Bytes of one layer on one of T tensor ranks.

    q = heads d / T and k = groups d / T are the numbers of a token's queries and keys, f = ffn / T
    (of all of its experts together) the MLP's.
    """

    def __init__(self, shape: ModelShape, split: Split, build: Build) -> None:
        self.shape, self.split, self.build = shape, split, build
        self.query = shape.heads * shape.head_dim / split.tensor
        self.key = shape.groups * shape.head_dim / split.tensor
        experts = shape.experts
        self.sent = experts.per_token if experts else 0  # copies of a token that go to experts
        self.ffn = (experts.per_token * experts.ffn if experts else shape.ffn) / split.tensor
        # Between the matrices each tensor rank has its share of the tokens.
        self.share = 1 / split.tensor if build.sequence_parallel else 1.0

    @property
    def input(self) -> float:
        """A token on its way between two layers."""
        return self.shape.hidden * self.build.item * self.share

    def attention(self, row: Row) -> float:
        """What is kept from the layer's input to that of the attention's projection."""
        item, tokens, shape = self.build.item, row.tokens, self.shape
        is_dense, one_node = self.build.attention == "dense", self.build.one_node
        each = self._normed
        if shape.family.qk_norm:
            each += self.query * item  # as their norm takes them
        again = self.build.recompute == "attention"
        if again or shape.family.qk_norm or not one_node:
            each += (self.query + 2 * self.key) * item  # some view of the joined product lives on
        each += FLOAT * (2 * shape.heads + shape.groups) / self.split.tensor
        if one_node:  # queries and keys turned, values, and what is the projection's input as well
            return tokens * (each + (2 * self.query + (1 if again else 2) * self.key) * item)
        each += 3 * self.query * item  # queries as the kernel takes them, its output, the input
        if not is_dense:
            return tokens * (each + self.key * item)
        if again:
            return tokens * each
        gathered = 2 * self.key * item * max(tokens, row.pairs / DENSE_CHUNK)
        return tokens * each + gathered + item * row.pairs

    def mlp(self, tokens: float) -> float:
        """What is kept from the second norm to the layer's output."""
        if self.build.recompute == "mlp":
            return tokens * self._normed
        return tokens * (self._normed + self._gated())

    @property
    def _normed(self) -> float:
        """Of a token what a norm of the residual stream takes and gives."""
        return 2 * self.input

    def _gated(self) -> float:
        """What a token keeps between the MLP's two matrices, or in its experts."""
        item, experts = self.build.item, self.shape.experts
        if experts is None:
            return GATE_COPIES * self.ffn * item
        sent = self.sent * self.shape.hidden * item
        return sent + (GATE_COPIES + 1) * self.ffn * item + ROUTER_COPIES * experts.count * FLOAT

    def saved(self, row: Row) -> float:
        """All that a layer keeps of a row for its backward pass."""
        low_rank = self.build.low_rank
        terms = len(low_rank.targets) * low_rank.rank * self.build.item if low_rank else 0
        return self.attention(row) + self.mlp(row.tokens) + row.tokens * terms

    def saved_last(self, row: Row) -> float:
        """The same of the model's last layer, which carries on the positions that are read."""
        if self.build.sequence_parallel:
            return self.saved(row)
        return self.attention(row) + self.mlp(row.positions)

    def again(self, row: Row) -> float:
        """What is computed once more, and then kept, in the backward pass of a layer."""
        if self.build.recompute == "false":
            return 0.0
        whole = LayerMemory(self.shape, self.split, replace(self.build, recompute="false"))
        if self.build.recompute == "true":
            return whole.saved(row)
        return max(whole.saved(row) - self.saved(row), 0.0)

    def forward_work(self, row: Row) -> float:
        """What a layer has at a time where nothing is kept: in its MLP, or in its attention."""
        item, tokens = self.build.item, row.tokens
        stream = 4 * self.input + self.shape.hidden * item
        mlp = GATE_COPIES * self.ffn + self.sent * self.shape.hidden
        attention = 3 * self.query + 4 * self.key + 2 * self.shape.head_dim
        if self.build.one_node:  # in float32, and what is added to the scores
            wide = (2 * self.query + 2 * self.key) if item < FLOAT else 0
            attention += (wide + row.pairs / max(tokens, 1)) * FLOAT / item
        elif self.build.attention == "dense":
            attention += (2 * self.key * row.pairs / DENSE_CHUNK + row.pairs) / max(tokens, 1)
        return tokens * (stream + max(mlp, attention) * item)

    def backward_work(self, row: Row) -> float:
        """Gradients of activations that a layer has at a time beside what it keeps, and that of
        its largest weight, before it is added to the sums.
        """
        item = self.build.item
        activations = row.tokens * (2 * self.ffn * item + 2 * self.input)
        if self.build.low_rank or self.build.spec == "te":
            return activations
        return activations + self.largest_weight * item

    @property
    def largest_weight(self) -> float:
        """Numbers of the largest matrix on this rank."""
        experts = self.shape.experts
        ffn = (experts.ffn if experts else self.shape.ffn) / self.split.tensor
        return self.shape.hidden * max(2 * ffn, self.query + 2 * self.key)


def saved_activations(layer: LayerMemory, row: Row, *, is_last_stage: bool) -> float:
    """Bytes that a stage's layers keep of a row between its forward and its backward pass."""
    layers = layer.shape.layers // layer.split.pipeline
    if layer.build.recompute == "true":
        return layers * row.tokens * layer.input
    if not is_last_stage:
        return layers * layer.saved(row)
    norm = 2 * layer.shape.hidden * layer.build.item * row.positions  # the final one
    return (layers - 1) * layer.saved(row) + layer.saved_last(row) + norm


def vocabulary_columns(shape: ModelShape, split: Split) -> float:
    return padded_vocab(shape.vocab_size, split.tensor) / split.tensor


def divergence_work(layer: LayerMemory, row: Row, chunk_rows: int) -> float:
    """Logits of a chunk of positions, and the gradients that the divergence writes as it goes."""
    shape, item = layer.shape, layer.build.item
    columns, rows = vocabulary_columns(shape, layer.split), min(chunk_rows, row.positions)
    copies = (HOST_LOGIT_COPIES if layer.build.on_host else LOGIT_COPIES) * FLOAT
    copies += item if item < FLOAT else 0
    piece = PIECE_COPIES * FLOAT * min(PIECE, rows * columns) if layer.build.on_host else 0
    # In 16 bits a chunk's product is made in float32 before it is added.
    in_sums = layer.build.sums_head and item == FLOAT
    head = 0 if layer.build.low_rank or in_sums else columns * shape.hidden * FLOAT
    return rows * columns * copies + piece + head + 2 * row.positions * shape.hidden * item


def embedding_gradient(layer: LayerMemory) -> float:
    """One gradient of the embedding or the output layer, in the weights' type."""
    if layer.build.low_rank:
        return 0.0
    return vocabulary_columns(layer.shape, layer.split) * layer.shape.hidden * layer.build.item
