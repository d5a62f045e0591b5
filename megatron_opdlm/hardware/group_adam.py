"""An Adam with the contract of Transformer Engine's FusedAdam, one ``step`` per parameter group,
for wherever Megatron would fall back to torch's: on CPUs, and on GPUs without Transformer Engine
and Apex. So every run takes the code path of production runs through the distributed optimizer.

With torch's own, whose state has a ``step`` for each parameter, Megatron (0.16) trains and saves
but cannot load: it asks the optimizer that is still empty for its state, of which
``distrib_optimizer.py``, ``state_dict``, asserts that it names one step count.
"""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20  # numbers updated at a time: what is in between stays small, and in a CPU's cache

_Tensors = tuple[Tensor, ...]  # parameter, gradient, average, average of squares


class GroupAdam(torch.optim.Optimizer):
    """Adam whose step count belongs to the parameter group, as in Transformer Engine's FusedAdam.

    Kingma and Ba (2015) with decoupled weight decay (Loshchilov and Hutter, 2019) when
    ``adam_w_mode`` is set. State per parameter: ``exp_avg`` and ``exp_avg_sq``, nothing else, which
    is what Megatron's distributed optimizer stores.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore -- torch's, without closures
        """One update of every group. The moments are kept in float32 like the main parameters."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            if not group["params"]:  # FusedAdam does not count the steps of an empty group
                continue
            group["step"] = group.get("step", 0) + 1
            for together in _batches(self._tensors(group["params"])):
                self._update(together, group)

    def _tensors(self, parameters: Iterable[Any]) -> Iterator[_Tensors]:
        """Those of every parameter that has a gradient, flat."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            whole = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
            yield tuple(tensor.view(-1) for tensor in whole)

    def _update(self, together: list[_Tensors], group: dict[str, Any]) -> None:
        parameters, gradients, averages, averages_of_squares = map(
            list, zip(*together, strict=True)
        )
        beta1, beta2 = group["betas"]
        if group["weight_decay"] and self.adam_w_mode:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            decay = group["weight_decay"]
            gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(averages_of_squares, beta2)
        torch._foreach_addcmul_(averages_of_squares, gradients, gradients, value=1 - beta2)
        correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        denominators = torch._foreach_div(averages_of_squares, correction2)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        step = -group["lr"] / correction1
        torch._foreach_addcdiv_(parameters, averages, denominators, value=step)


def _batches(tensors: Iterable[_Tensors]) -> Iterator[list[_Tensors]]:
    """Small parameters together and large ones in pieces: at most PIECE numbers at a time."""
    batch: list[_Tensors] = []
    room = PIECE
    for whole in tensors:
        small = len(whole[0]) <= PIECE
        for piece in [whole] if small else zip(*(x.split(PIECE) for x in whole), strict=True):
            if len(piece[0]) > room:
                yield batch
                batch, room = [], PIECE
            batch.append(piece)
            room -= len(piece[0])
    if batch:
        yield batch


def replace_in(module_name: str, **attributes: Any) -> None:
    """Set attributes of a module."""
    vars(importlib.import_module(module_name)).update(attributes)


def use_where_megatron_falls_back() -> None:
    """Give Megatron this Adam if it has found no fused one."""
    if importlib.import_module("megatron.core.optimizer").USING_PYTORCH_OPTIMIZER:
        use_in_megatron()


def use_in_megatron() -> None:
    """Give Megatron this Adam."""
    replace_in("megatron.core.optimizer", Adam=GroupAdam, USING_PYTORCH_OPTIMIZER=False)
    replace_in(
        "megatron.core.optimizer.distrib_optimizer",
        Adam=GroupAdam,
        HAVE_APEX_OR_TE=True,
        USING_TE_OPTIMIZER=True,
    )
