"""What a draw costs: operations that start a kernel, reductions over tensor ranks, CPU time.

python -m benchmarks.draw
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_opdlm.diffusion import denoising
from megatron_opdlm.hardware import select_hardware

VOCABULARY, ROWS, ROUNDS = 151_936, 8, 3
SHAPINGS: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.95}, {"top_k": 20, "top_p": 0.95}]
# Operations that only make or view a tensor.
WITHOUT_KERNEL = {
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "as_strided", "resize_")
}


class Counted(denoising.WholeVocabulary):
    """Counts what tensor ranks would have to agree on."""

    count = 0

    def _counted(self, x: Tensor) -> Tensor:
        self.count += 1
        return x

    max = min = sum = gather_rows = _counted

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count += 1
        return super().before(x)


def operations(logits: Tensor, uniform: Tensor, shaping: dict[str, Any]) -> int:
    """Operations of a draw that start a kernel."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        denoising.draw(logits, uniform, temperature=1.0, with_entropy=False, **shaping)
    events = [e for e in found.events() or [] if e.name.startswith("aten::")]
    return sum(not e.cpu_children and e.name not in WITHOUT_KERNEL for e in events)


def main() -> None:
    """Print one line for each way to draw."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * 3
    uniform = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    for shaping in SHAPINGS:
        counted, seconds = Counted(), []
        for _ in range(ROUNDS):
            counted.count, begin = 0, time.process_time()
            denoising.draw(
                logits,
                uniform,
                temperature=1.0,
                with_entropy=False,
                shard=counted,
                numbers_at_once=select_hardware().draw_numbers,
                **shaping,
            )
            seconds.append(time.process_time() - begin)
        print(
            f"{shaping}: {operations(logits[:, :999], uniform, shaping)} operations, "
            f"{counted.count} reductions, {min(seconds) / ROWS * 1000:.1f} CPU ms a row"
        )


if __name__ == "__main__":
    main()
