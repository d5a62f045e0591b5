"""The cache of a rollout: how much room it has, and what for."""

from dataclasses import dataclass

from megatron_opdlm import parallel
from megatron_opdlm.errors import RunError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.kv_cache import KVCache

CACHE_SHARE = 0.5  # of the free memory, where no budget is given
# Positions of a page for block rows: the smallest page that flash-attn reads.
PAGE_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much a decoder holds."""

    slots: int
    positions: int  # of the longest sequence
    page_tokens: int
    pages: int  # of all groups, without the scratch pages

    @property
    def pages_of_longest(self) -> int:
        return -(-self.positions // self.page_tokens)


def room_for(
    model: LanguageModel,
    *,
    paged: bool,
    slots: int,
    positions: int,
    kv_cache_tokens: int | None,
) -> Room:
    """Slots and pages for sequences of at most ``positions`` within ``kv_cache_tokens`` (None: half
    of the free memory), at least for one. Pages within a given budget are for somewhat longer
    sequences, so that the next rollout finds the same room. Without ``paged`` a whole sequence has
    a page of its own.

    Raises RunError for a budget that does not hold the longest sequence.
    """
    fixed = kv_cache_tokens is not None
    if kv_cache_tokens is None:
        free = CACHE_SHARE * select_hardware().free_memory_bytes()
        kv_cache_tokens = parallel.least_over_replica(int(free) // _bytes_per_token(model))
    elif kv_cache_tokens < positions:
        raise RunError(
            f"rollout.kv_cache_tokens={kv_cache_tokens} is less than the {positions} positions of "
            "the longest prompt and response; raise it, or lower that max_new_tokens"
        )
    if not paged:
        slots = min(slots, max(1, kv_cache_tokens // positions))
        return Room(slots=slots, positions=positions, page_tokens=positions, pages=slots)
    if fixed:
        positions = _steady(positions, kv_cache_tokens)
    most = slots * -(-positions // PAGE_TOKENS)
    pages = min(most, max(kv_cache_tokens, positions + PAGE_TOKENS - 1) // PAGE_TOKENS)
    return Room(slots=slots, positions=positions, page_tokens=PAGE_TOKENS, pages=pages)


def _steady(positions: int, kv_cache_tokens: int) -> int:
    """At most a quarter or a page more positions, so that rollouts whose longest prompts differ
    have the same room; unless the budget would hold fewer groups of slots for it.
    """
    step = max(PAGE_TOKENS, 1 << max(0, positions.bit_length() - 3))
    rounded = -(-positions // step) * step
    return rounded if rounded * parallel.pipeline_size() <= kv_cache_tokens else positions


def open_cache(model: LanguageModel, room: Room, *, scratch: int) -> KVCache:
    """Pages of this rank's layers and groups, ``scratch`` more than the room has."""
    return KVCache(
        layer_numbers=model.layer_numbers,
        pages=room.pages + scratch,
        page_tokens=room.page_tokens,
        groups=_local_groups(model),
        head_dim=model.shape.head_dim,
        dtype=model.config.params_dtype,
        device=select_hardware().device,
    )


def _local_groups(model: LanguageModel) -> int:
    return model.shape.groups // model.config.tensor_model_parallel_size


def _bytes_per_token(model: LanguageModel) -> int:
    """Cache memory of one position on this rank: keys and values of its layers and groups."""
    values = 2 * len(model.layer_numbers) * _local_groups(model) * model.shape.head_dim
    return values * model.config.params_dtype.itemsize
