"""FP8 linears of an exported model, as ModelOpt's checkpoints describe them: E4M3 numbers with one
scale a tensor, weights and inputs.

They compute what engines with FP8 units compute, in the model's own type: an E4M3 number is exact
in bfloat16, so only the sum is rounded otherwise. That needs no special hardware and is not fast.
"""

from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 448.0  # of E4M3; larger inputs are clipped to it


class Fp8Linear(nn.Module):
    """y = (input_scale * weight_scale) * fp8(x / input_scale) @ weight^T + bias"""

    def __init__(self, linear: nn.Linear) -> None:
        """Of the size of ``linear``, with its bias."""
        super().__init__()
        in_features, out_features = linear.in_features, linear.out_features
        device = linear.weight.device
        numbers = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        for name in ("weight_scale", "input_scale"):
            one = torch.ones((), dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(one, requires_grad=False))
        self.bias = linear.bias  # None in most families

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        scaled = (x.float() / self.input_scale).clamp(-LARGEST, LARGEST)
        rounded = scaled.to(torch.float8_e4m3fn).to(x.dtype)
        product = nn.functional.linear(rounded, self.weight.to(x.dtype))
        scaled = (product.float() * (self.input_scale * self.weight_scale)).to(x.dtype)
        return scaled if self.bias is None else scaled + self.bias


def use_fp8_linears(model: Any) -> None:
    """Replace the linears of the layers where the configuration says that they are stored so."""
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, dict) or described.get("quant_method") != "modelopt":
        return
    if described.get("quant_algo") != "FP8":
        raise ValueError(f"quant_algo={described.get('quant_algo')!r}; this file reads 'FP8' only")
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Fp8Linear(child))


__all__ = ["Fp8Linear", "use_fp8_linears"]
