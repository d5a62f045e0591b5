"""Memory of a rank, estimated from shapes and layout before anything is built.

Weights are taken as split evenly over the tensor ranks (norms, which every one of them holds, are
under a thousandth), and the largest pipeline stage is counted. Activations, communication buffers
and the allocator's waste come on top of everything here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_opdlm.model_files.shape import ModelShape, padded_vocab

GRADIENT_BYTES = 4  # sums are float32 whatever the weights are


@dataclass(frozen=True, kw_only=True)
class Split:
    """Over how many ranks things are divided."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1  # of the data-parallel ranks
    data: int = 1


@dataclass(frozen=True, kw_only=True)
class RankNumbers:
    """Numbers (not bytes) of a model's weights on the fullest rank."""

    dense: float  # replicated over the data and context ranks
    experts: float = 0.0  # replicated over those divided by the expert ranks

    @property
    def total(self) -> float:
        return self.dense + self.experts

    def optimizer_share(self, split: Split) -> float:
        """Numbers whose optimizer state this rank keeps: Megatron's distributed optimizer divides
        it over the ranks that hold the same weights.
        """
        copies = split.data * split.context
        return self.dense / copies + self.experts / (copies / split.expert)


def rank_numbers(shape: ModelShape, split: Split) -> RankNumbers:
    """Weights of the fullest pipeline stage on one of its tensor ranks."""
    embedding = padded_vocab(shape.vocab_size, split.tensor) * shape.hidden
    experts = 0
    if shape.experts is not None:
        experts = 3 * shape.hidden * shape.experts.ffn * shape.experts.count
    layers = shape.layers // split.pipeline
    # The last stage of several has an output layer of its own even where it is tied to the first's.
    ends = embedding if split.pipeline > 1 or shape.tied else 2 * embedding
    return RankNumbers(
        dense=(layers * shape.layer_parameters + ends + shape.hidden) / split.tensor,
        experts=layers * experts / split.tensor / split.expert,
    )


def kv_bytes_per_token(shape: ModelShape, split: Split, item_bytes: int) -> float:
    """Cache of one position on one rank: keys and values of its layers and its groups."""
    layers, groups = shape.layers / split.pipeline, shape.groups / split.tensor
    return 2 * layers * groups * shape.head_dim * item_bytes


def optimizer_bytes_per_number(item_bytes: int, state_types: Mapping[str, str]) -> int:
    """Main parameter (beside 16-bit weights only) and Adam's two moments.

    ``state_types``: ``main_params``, ``exp_avg`` and ``exp_avg_sq`` to fp32, bf16 or fp16.
    """
    size = {name: 4 if kind == "fp32" else 2 for name, kind in state_types.items()}
    main = size["main_params"] if item_bytes == 2 else 0
    return main + size["exp_avg"] + size["exp_avg_sq"]
