"""What NVIDIA GPUs mean for Megatron: NCCL, bfloat16 by default. Not run on a GPU yet."""

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware.peak_memory import PeakMemory

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # environment of a program that shall see no GPU

# Positions projected to the vocabulary at once, enough for the matrix products to be large; three
# float32 arrays of 1,024 x 151,936 numbers are 1.7 GiB, divided by the tensor ranks. Not measured.
PROJECTION_ROWS = 1024
ROW_TOKENS = 4096  # of a packed row; not measured

# Our kernel, which comes with every CUDA build of torch, before FlashAttention's. Neither measured.
DECODE_ATTENTION = ("triton", "flash", "rows")


def transformer_options(engine: str | None) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig where ``engine`` is Transformer Engine's version."""
    return {
        "use_cpu_initialization": False,
        # SwiGLU as one compiled function each way, which keeps its input only
        # (megatron/core/fusions/fused_bias_swiglu.py).
        "bias_activation_fusion": True,
        # Transformer Engine's kernel, which takes our angles as they are, float32 [s, 1, 1, d];
        # without it Megatron refuses the option.
        "apply_rope_fusion": engine is not None,
        # Nothing is left to fuse: no bias, no dropout, one addition. Compiled, it would cost the
        # host its guards in every layer.
        "bias_dropout_fusion": False,
        # The softmax is inside our attention, and there is no LayerNorm.
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # Only the trained model has sums to add to: ``optimizer.fuse_gradients`` tells its linears.
        "gradient_accumulation_fusion": False,
        "batch_p2p_comm": False,
        "deallocate_pipeline_outputs": False,
    }


def transformer_engine() -> str | None:
    """Version of Transformer Engine, None where it is not installed. A broken one raises: it must
    not be mistaken for none.
    """
    try:
        importlib.import_module("transformer_engine")
    except ModuleNotFoundError:
        return None
    importlib.import_module("transformer_engine.pytorch")
    return str(importlib.import_module("megatron.core.utils").get_te_version())


def peak_memory() -> PeakMemory:
    """Of GPU memory that tensors have occupied on this rank."""
    return PeakMemory(torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats)


def free_memory_bytes() -> int:
    """GPU memory that is not taken, what torch's allocator holds unused included."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def device_names() -> tuple[str, ...]:
    """Of all GPUs that this process can see."""
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def device_states() -> list[tuple[str, int, int, str]]:
    """Name, bytes of memory, bytes that are free and compute capability of each GPU."""
    states = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        states.append((torch.cuda.get_device_name(i), total, free, capability))
    return states


def libraries() -> str:
    """Versions of what the GPUs are driven by."""
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    engine = transformer_engine() or "not installed"
    return f"CUDA {torch.version.cuda}, NCCL {nccl}, Transformer Engine {engine}"


def start_capture() -> None:
    """Begin what a profiler outside the process records."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()


def stop_capture() -> None:
    """End it when the GPU has done all that was asked of it."""
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def named_range(name: str) -> AbstractContextManager[None]:
    """The body is an NVTX range."""
    return torch.cuda.nvtx.range(name)


def record_memory() -> None:
    """Keep every allocation from now on, with the Python lines that made it."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)


def write_memory(file: Path) -> None:
    """Write what ``record_memory`` kept, and keep nothing from now on."""
    torch.cuda.memory._dump_snapshot(str(file))
    torch.cuda.memory._record_memory_history(enabled=None)


def set_device(local_rank: int) -> torch.device:
    """Bind this process to its GPU: the one that it sees where it sees one (Slurm's
    ``--gpus-per-task=1``), else that of its number on the machine.
    """
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise InputError(
            f"LOCAL_RANK={local_rank}, but this process sees {visible} GPUs; start at most "
            f"{visible} ranks on this machine, or show it more (CUDA_VISIBLE_DEVICES)"
        )
    number = local_rank if visible > 1 else 0
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def upload(x: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU, which nobody waits for."""
    return x.pin_memory().to("cuda", non_blocking=True)


def fetch(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying to the host; the function that comes back waits and gives the copy."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return copy

    return wait


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all captures: CUDA hands out few, and the allocator keeps memory for each."""
    return torch.cuda.Stream()


class Graphs:
    """CUDA graphs that share one memory pool, since they are replayed one after the other. The pool
    dies with its graphs: one that outlived them could not be captured into again.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Capture the kernels of ``run`` in a CUDA graph. The function that comes back replays them
        on whatever then lies in the tensors that ``run`` read, and returns the same output tensor.
        """
        side = _side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose algorithms, take memory, compile
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
