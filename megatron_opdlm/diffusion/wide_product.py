"""Products whose sums stay as they are made."""

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices, in float32 at least.

    Of 16-bit matrices a GPU's kernels make the sums in float32, and give them out so; a product
    that is rounded to 16 bits first has lost what tells two likely tokens apart. On a CPU, where
    torch does not offer that, it is rounded.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cpu":
        return (a @ b).to(wide)
    return torch.mm(a, b, out_dtype=wide)
