"""Products of 16-bit matrices come in float32."""

import pytest
import torch

from megatron_opdlm.diffusion.wide_product import wide_product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_type_and_value(dtype: torch.dtype):
    """Claim: never less than float32, the wider types exactly as PyTorch multiplies them; where the
    device is no CPU PyTorch is asked for sums that are not rounded (``torch.mm(out_dtype=...)``,
    which this version has)."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 5), (4, 5)))
    a, b = a.to(dtype), b.to(dtype).t()
    wide = torch.promote_types(dtype, torch.float32)
    found = wide_product(a, b)
    assert found.dtype is wide
    exact = a.double() @ b.double()
    torch.testing.assert_close(found.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=1e-2)
    elsewhere = wide_product(a.to("meta"), b.to("meta"))
    assert elsewhere.dtype is wide and elsewhere.shape == (3, 4)
