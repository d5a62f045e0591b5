"""The student as Megatron stores it: its tensors under their keys, and how they come back."""

import copy
import re
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.storage.optimizer_shards import joined, owned_states, sharded
from megatron_opdlm.update import Student

PREFIX = "model."  # of the weights' keys, in imported and in training checkpoints alike
# Of every module of Transformer Engine; its experts have one for each of a rank's, numbered.
_EXTRA_STATE = re.compile(r"\._extra_state\d*$")
_SHARDING, _STATE = "fully_reshardable", "param_state"  # Megatron's words


def layout_metadata() -> dict[str, Any]:
    """How Megatron lays out optimizer state so that any other parallel layout can read it.

    A new dictionary each time: Megatron adds the process group of the moment to it.
    """
    return {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True}


def weights_state(model: LanguageModel) -> dict[str, Any]:
    """The weights as Megatron stores them. Layers of either spec have the same: Megatron's own are
    stored under the names of Transformer Engine's, whose "extra state" (scales of FP8 products,
    which we do not compute) is left out.
    """
    state = model.sharded_state_dict(prefix=PREFIX, metadata=layout_metadata())
    return {name: value for name, value in state.items() if not _EXTRA_STATE.search(name)}


def fill(model: LanguageModel, loaded: dict[str, Any], kept: dict[str, Any]) -> None:
    """Give a model what ``weights_state`` asked for, and the values in ``kept``."""
    values = {name.removeprefix(PREFIX): value for name, value in loaded.items()}
    problems = model.load_state_dict(kept | values, strict=False)
    missing = [name for name in problems.missing_keys if not _EXTRA_STATE.search(name)]
    assert not missing and not problems.unexpected_keys, problems


def training_state(student: Student, *, is_loading: bool = False) -> dict[str, Any]:
    """Weights and optimizer as a checkpoint holds them, or as they are asked for when
    ``is_loading``: of the optimizer's state what this rank owns.
    """
    model = weights_state(student.model)
    tensors, _ = extract_sharded_tensors_and_factories(model)
    places = {place.data: place for place in nested_values(tensors)}
    chained: Any = student.optimizer
    if len(chained.chained_optimizers) > 1:
        chained._synchronize_steps()  # of groups that have no parameters on this rank
    states = []
    for optimizer in chained.chained_optimizers:
        if is_loading:  # makes the state, which a fresh optimizer does not have
            optimizer.load_state_dict(optimizer.state_dict())
        owned = enumerate(owned_states(optimizer))
        state = {number: sharded(one, places[one.parameter]) for number, one in owned}
        sharding = {_STATE: state, f"{_STATE}_sharding_type": _SHARDING}
        states.append(optimizer.state_dict() | sharding)
    return {"model": model, "optimizer": states[0] if len(states) == 1 else dict(enumerate(states))}


@torch.no_grad()
def restore_optimizer(student: Student, loaded: dict[Any, Any]) -> None:
    """Take back what was loaded for ``training_state``'s question."""
    chained: Any = student.optimizer
    own = _by_optimizer(loaded, len(chained.chained_optimizers))
    for optimizer, state in zip(chained.chained_optimizers, own, strict=True):
        values = state.pop(_STATE, {})
        optimizer.load_state_dict(state)
        for number, owned in enumerate(owned_states(optimizer)):
            flat = {name: joined(boxes) for name, boxes in values[number].items()}
            optimizer._set_main_param_and_optimizer_states(owned.parameter, flat)
    if len(own) > 1:
        chained._synchronize_steps()


def _by_optimizer(loaded: dict[Any, Any], count: int) -> list[dict[Any, Any]]:
    """The state of each of ``count`` optimizers.

    Megatron has an optimizer of its own for experts that are shared out over ranks, and the states
    of several lie under their numbers. Where a checkpoint was written with another number of them,
    each gets the options and the step count of the first; the tensors have the same keys.
    """
    several = [key for key in loaded if isinstance(key, int)]
    common = {key: value for key, value in loaded.items() if key not in several}
    if count == 1:
        return [(loaded[0] if several else {}) | common]
    if not common:
        return [loaded[number] for number in range(count)]
    return [
        _for_experts(copy.deepcopy(common), number > 0) | loaded[number] for number in range(count)
    ]


def _for_experts(state: dict[str, Any], experts: bool) -> dict[str, Any]:
    for group in state["optimizer"]["param_groups"]:
        group["is_expert_parallel"] = experts
    return state
