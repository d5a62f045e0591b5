"""The student as Megatron stores it: its tensors under their keys, and how they come back."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.update import Student

PREFIX = "model."  # of the weights' keys, in imported and in training checkpoints alike
_EXTRA_STATE = "_extra_state"


def layout_metadata() -> dict[str, Any]:
    """How Megatron lays out optimizer state so that any other parallel layout can read it.

    A new dictionary each time: Megatron adds the process group of the moment to it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def weights_state(model: LanguageModel) -> dict[str, Any]:
    """The weights as Megatron stores them. Layers of either spec have the same: Megatron's own are
    stored under the names of Transformer Engine's, whose "extra state" (scales of FP8 products,
    which we do not compute) is left out.
    """
    state = model.sharded_state_dict(prefix=PREFIX, metadata=layout_metadata())
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def fill(model: LanguageModel, loaded: dict[str, Any], kept: dict[str, Any]) -> None:
    """Give a model what ``weights_state`` asked for, and the values in ``kept``."""
    values = {name.removeprefix(PREFIX): value for name, value in loaded.items()}
    problems = model.load_state_dict(kept | values, strict=False)
    missing = [name for name in problems.missing_keys if not name.endswith(_EXTRA_STATE)]
    assert not missing and not problems.unexpected_keys, problems


def training_state(student: Student, *, is_loading: bool = False) -> dict[str, Any]:
    """Weights and optimizer as Megatron stores them, or asks for them when ``is_loading``."""
    model = weights_state(student.model)
    with _positions_without_padding(student):
        optimizer = student.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=layout_metadata()
        )
    return {"model": model, "optimizer": optimizer}


def optimizer_state(student: Student, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """What the optimizer takes back, of what was loaded for ``training_state``'s question.

    Megatron has an optimizer of its own for experts that are shared out over ranks, and the states
    of several lie under their numbers. Where a checkpoint was written with another number of them,
    each gets the options and the step count of the first; the tensors have the same keys.
    """
    optimizer: Any = student.optimizer
    own = range(len(optimizer.chained_optimizers))
    several = [key for key in loaded if isinstance(key, int)]
    common = {key: value for key, value in loaded.items() if key not in several}
    if len(own) == 1:
        first = loaded[0] if several else {}
        return first | common
    if not common:
        return loaded
    return {
        number: _for_experts(copy.deepcopy(common), number > 0) | loaded[number] for number in own
    }


def _for_experts(state: dict[str, Any], experts: bool) -> dict[str, Any]:
    for group in state["optimizer"]["param_groups"]:
        group["is_expert_parallel"] = experts
    return state


@contextmanager
def _positions_without_padding(student: Student) -> Iterator[None]:
    """Correct where Megatron cuts parameters out of the gathered optimizer state.

    Megatron (0.16) gathers it without the padding between gradient buckets, but slices it at the
    positions with padding, so parameters after a padded bucket get their neighbours' state. It
    happens where there are several buckets: a tied embedding has its own on a later pipeline stage.
    """
    ddp: Any = student.ddp  # Megatron's lists hide PyTorch's methods of those names
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    original = [(buffer, buffer.param_index_map) for buffer in buffers]
    for buffer, positions in original:
        padding = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
        before = list(itertools.accumulate(padding, initial=0))
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in positions.items()
        }
    try:
        yield
    finally:
        for buffer, positions in original:
            buffer.param_index_map = positions
