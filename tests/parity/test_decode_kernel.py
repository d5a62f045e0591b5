"""The decoding kernel in Triton's interpreter, and compiled to machine code: what can be shown of
it without a GPU. Needs the wheel of Triton, which CUDA builds of torch bring and CPU builds do not.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).parents[2]

# Triton reads TRITON_INTERPRET when a kernel is defined, so each form has a process of its own.
INTERPRETED = """
import torch
from megatron_opdlm.model import decode_attention, decode_kernel
generator = torch.Generator().manual_seed(5)
def normal(*size):
    return torch.randn(size, generator=generator)
for block, heads, groups, width, page in (
    (4, 4, 2, 16, 16), (3, 6, 2, 24, 16), (32, 2, 1, 16, 16)
):
    # every residue of tile and page
    ends = list(range(block, block + 2 * page + 1))
    wide = -(-max(ends) // page)
    slots = 3
    pages = torch.randperm(slots * wide + 2, generator=generator)[: slots * wide]
    rows = decode_attention.BlockRows(
        slot=torch.randint(slots, (len(ends),), generator=generator).int(),
        visible=torch.tensor(ends).int(),
        table=pages.view(slots, wide).int(),
        block_size=block,
        kernel=decode_kernel.attend,
    )
    keys, values = (normal(slots * wide + 2, page, groups, width) for _ in range(2))
    query = normal(len(ends) * block, heads, width)
    found = decode_attention.attend_rows(query, keys, values, rows, width**-0.5)
    # the definition, head by head in float64
    each = heads // groups
    for r, end in enumerate(ends):
        table = rows.table[int(rows.slot[r])].long()
        own_keys, own_values = (x[table].flatten(0, 1)[:end].double() for x in (keys, values))
        for h in range(heads):
            q = query[r * block : (r + 1) * block, h].double()
            weights = (q @ own_keys[:, h // each].T * width**-0.5).softmax(-1)
            expected = (weights @ own_values[:, h // each]).float()
            torch.testing.assert_close(found[r * block : (r + 1) * block, h], expected)
print("agrees")
"""

COMPILED = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_opdlm.model import decode_kernel
made = {}
for architecture in (80, 90):
    for element in ("bf16", "fp32"):
        for block, ratio in ((4, 2), (32, 4)) if element == "bf16" else ((4, 2),):
            groups, width = 8, 128
            constants = decode_kernel.shapes(block * ratio, groups, width, 256)
            pointers = dict.fromkeys(("query", "keys", "values", "out"), "*" + element)
            indices = dict.fromkeys(("slot", "visible", "table"), "*i32")
            signature = pointers | indices | {"table_width": "i32", "scale": "fp32"}
            signature |= dict.fromkeys(constants, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
            source = ASTSource(decode_kernel.attend_row, signature, constants, aligned)
            kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            name = f"sm_{architecture} {element} {block}x{ratio}"
            products = kernel.asm["ptx"].count("mma")
            made[name] = [len(kernel.asm["cubin"]), kernel.metadata.shared, products]
print(json.dumps(made))
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kernel_computes_the_definition():
    """Claim: at every number of visible positions, hence every residue of tile and page, with
    shuffled pages and any slot, blocks of 3 to 32 tokens, 2 or 3 query heads a group, and a head
    size that is no power of two, the interpreted kernel gives the sums of the definition."""
    assert "agrees" in run(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_kernel_compiles_for_real_gpus(tmp_path: Path):
    """Claim: machine code for A100 (sm_80) and H100 (sm_90) comes out for Qwen3's heads in 16 bits
    at blocks of 4 and 32 and in 32 bits at blocks of 4; its shared memory fits; in 16 bits the
    products are matrix instructions."""
    made = json.loads(run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(made) == 6
    for name, (size, shared, products) in made.items():
        assert size > 1000
        assert shared <= (164 if "sm_80" in name else 227) * 1024
        assert products > 0 or "fp32" in name
