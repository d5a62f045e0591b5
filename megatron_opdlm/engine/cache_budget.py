"""The cache of a rollout, and how many sequences fit it."""

from megatron_opdlm import parallel
from megatron_opdlm.errors import RunError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.kv_cache import KVCache

CACHE_SHARE = 0.5  # of the free memory, where no budget is given


def open_cache(model: LanguageModel, slots: int, positions: int) -> KVCache:
    """A cache of this rank's layers and groups."""
    return KVCache(
        layer_numbers=model.layer_numbers,
        slots=slots,
        positions=positions,
        groups=_local_groups(model),
        head_dim=model.shape.head_dim,
        dtype=model.config.params_dtype,
        device=select_hardware().device,
    )


def fitting_slots(model: LanguageModel, positions: int, kv_cache_tokens: int | None) -> int:
    """Sequences of ``positions`` cached tokens that the budget holds, at least one."""
    if kv_cache_tokens is None:
        free = CACHE_SHARE * select_hardware().free_memory_bytes()
        tokens = parallel.least_over_replica(int(free) // _bytes_per_token(model))
        return max(1, tokens // positions)
    if kv_cache_tokens < positions:
        raise RunError(
            f"rollout.kv_cache_tokens={kv_cache_tokens} is less than the {positions} positions of "
            "the longest prompt and response; raise it, or lower that max_new_tokens"
        )
    return kv_cache_tokens // positions


def _local_groups(model: LanguageModel) -> int:
    return model.shape.groups // model.config.tensor_model_parallel_size


def _bytes_per_token(model: LanguageModel) -> int:
    """Cache memory of one position on this rank: keys and values of its layers and groups."""
    values = 2 * len(model.layer_numbers) * _local_groups(model) * model.shape.head_dim
    return values * model.config.params_dtype.itemsize
