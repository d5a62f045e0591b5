"""An Adam with the contract of Transformer Engine's FusedAdam, one ``step`` per parameter group,
for wherever Megatron would fall back to torch's: on CPUs, and on GPUs without Transformer Engine
and Apex. So every run takes the code path of production runs through the distributed optimizer.

With torch's own, whose state has a ``step`` for each parameter, Megatron (0.16) trains and saves
but cannot load: it asks the optimizer that is still empty for its state, of which
``distrib_optimizer.py``, ``state_dict``, asserts that it names one step count.
"""

import importlib
from collections.abc import Iterable
from typing import Any

import torch

PIECE = 2**20  # numbers updated at a time: what is in between stays small, and in a CPU's cache


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        whole = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        pieces = zip(*(x.view(-1).split(PIECE) for x in whole), strict=True)
        for of_parameter, of_gradient, of_average, of_squares in pieces:
            self._update_piece(of_parameter, of_gradient, of_average, of_squares, group)

    def _update_piece(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        average: torch.Tensor,
        average_of_squares: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        beta1, beta2 = group["betas"]
        if group["weight_decay"] and self.adam_w_mode:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        average.lerp_(gradient, 1 - beta1)
        average_of_squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        denominator = (average_of_squares / correction2).sqrt_().add_(group["eps"])
        parameter.addcdiv_(average, denominator, value=-group["lr"] / correction1)


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
