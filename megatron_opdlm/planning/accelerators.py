"""Accelerators as their vendor describes them, and what share of that is taken to be reached.

Nothing in here was measured by us. Rates are those of NVIDIA's datasheets, without sparsity
(docs/planning.md says where each stands); the efficiencies are assumptions, stated in every plan.
"""

from dataclasses import dataclass

GIB, TERA, GIGA = 2**30, 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU, and what it is connected with."""

    kind: str  # as PyTorch's name of the device contains it
    name: str
    memory: float  # bytes that a process finds
    flops: float  # bfloat16 with float32 sums, operations a second
    bandwidth: float  # of its memory, bytes a second
    link: float  # to another one of its machine, bytes a second and direction
    network: float  # to one of another machine: one network card a GPU, as usual with this one
    host: float  # to host memory


ACCELERATORS = {
    "h200": Accelerator(
        kind="H200",
        name="H200 SXM 141 GB",
        memory=139 * GIB,
        flops=989 * TERA,
        bandwidth=4800 * GIGA,
        link=450 * GIGA,
        network=50 * GIGA,
        host=64 * GIGA,
    ),
    "h100": Accelerator(
        kind="H100",
        name="H100 SXM 80 GB",
        memory=79 * GIB,
        flops=989 * TERA,
        bandwidth=3350 * GIGA,
        link=450 * GIGA,
        network=50 * GIGA,
        host=64 * GIGA,
    ),
    "b200": Accelerator(
        kind="B200",
        name="B200 SXM 180 GB",
        memory=178 * GIB,
        flops=2250 * TERA,
        bandwidth=8000 * GIGA,
        link=900 * GIGA,
        network=50 * GIGA,
        host=64 * GIGA,
    ),
    "a100": Accelerator(
        kind="A100",
        name="A100 SXM 80 GB",
        memory=79 * GIB,
        flops=312 * TERA,
        bandwidth=2039 * GIGA,
        link=300 * GIGA,
        network=25 * GIGA,
        host=32 * GIGA,
    ),
    "a6000": Accelerator(
        kind="A6000",
        name="RTX A6000 48 GB",
        memory=47.5 * GIB,
        flops=154.8 * TERA,
        bandwidth=768 * GIGA,
        link=32 * GIGA,  # PCIe 4.0 x16: bridges join pairs only
        network=12.5 * GIGA,
        host=32 * GIGA,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the datasheet's rates that a phase is taken to reach."""

    update: float = 0.40  # of operations a second
    teacher: float = 0.50
    rollout: float = 0.40
    bandwidth: float = 0.60  # of the memory's, while decoding and in the optimizer
    link: float = 0.70  # of every connection


ASSUMED = Efficiency()
# What a rank works with beside what it holds is estimated to within 15 %.
MARGIN = 1.15
USABLE = 0.92  # of the memory: the rest is the driver's, NCCL's and what the allocator wastes
