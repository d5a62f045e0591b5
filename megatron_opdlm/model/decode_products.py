"""A model's products while decoding: many small ones with weights that stay as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_opdlm.hardware import Product, select_hardware
from megatron_opdlm.model.gpt import LanguageModel

_PRODUCT = "_forward_impl"  # Megatron's product of a linear


@contextmanager
def laid_out_weights(model: LanguageModel) -> Iterator[None]:
    """Multiply with weights in the order that this hardware multiplies fastest in, beside the
    model's own, where it has one.
    """
    # Not what quantization makes of them: its weights are made for every product.
    kinds = ColumnParallelLinear, RowParallelLinear
    linears: list[Any] = [one for one in model.decoder.modules() if type(one) in kinds]
    weights = [linear.weight for linear in linears]
    if model.post_process:
        weights.append(model.head_weight)
    products = select_hardware().laid_out(weights)
    try:
        if model.post_process:
            model.head_product = products.pop()
        for linear, product in zip(linears, products, strict=True):
            if product is not None:
                vars(linear)[_PRODUCT] = _without_gradient(product)
        yield
    finally:
        model.head_product = None
        for linear in linears:
            vars(linear).pop(_PRODUCT, None)


def _without_gradient(product: Product) -> Any:
    """As Megatron calls it."""

    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        made = product(input)
        return made if bias is None else made + bias

    return multiply
