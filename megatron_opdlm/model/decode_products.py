"""The layers' products while decoding: many small ones with weights that stay as they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model.gpt import LanguageModel

_PRODUCT = "_forward_impl"  # Megatron's product of a linear
_SHARE = 0.5  # of the free memory that the weights may take once more


@contextmanager
def laid_out_weights(model: LanguageModel) -> Iterator[None]:
    """Multiply with weights in the order that this hardware multiplies fastest in, beside the
    model's own, where it has one and there is memory for them. Results are the same.
    """
    hardware = select_hardware()
    # Not what quantization makes of them: its weights are made for every product.
    kinds = ColumnParallelLinear, RowParallelLinear
    linears: list[Any] = [one for one in model.decoder.modules() if type(one) in kinds]
    if sum(one.weight.nbytes for one in linears) > _SHARE * hardware.free_memory_bytes():
        linears = []
    changed: list[Any] = []
    try:
        for linear in linears:
            product = hardware.laid_out(linear.weight)
            if product is not None:
                vars(linear)[_PRODUCT] = _without_gradient(product)
                changed.append(linear)
        yield
    finally:
        for linear in changed:
            del vars(linear)[_PRODUCT]


def _without_gradient(product: Callable[[Tensor], Tensor]) -> Any:
    """As Megatron calls it."""

    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        made = product(input)
        return made if bias is None else made + bias

    return multiply
