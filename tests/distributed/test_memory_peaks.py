"""Claim: what the planner says a rank comes to need is what a training step takes at its peak.

Every case is one real step (rollout, teacher, two updates) in processes of its own, whose largest
resident memory is compared; what a model of no size takes (libraries, their buffers) is left out.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm.config import load_config
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.planning.phase_memory import RankMemory
from megatron_opdlm.run.expected_memory import Load, expected_memory, split_of
from megatron_opdlm.storage.model_source import open_model
from tests.distributed.memory_jobs import train_and_measure
from tests.forking import ForkServer, free_port, rank_environment
from tests.tiny_models import make_model

TOLERANCE = 0.15
MIB = 2**20
MASK, END = 64, 66  # neither can be drawn: the tokenizer ends before them
PROMPT = 60  # tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a layout and what a step is made of: ``sequences`` responses of ``response``
    tokens, half of them in each update."""

    shape: dict[str, Any]
    sequences: int
    response: int
    model_type: str = "qwen3"
    ranks: int = 1
    keys: list[str] = field(default_factory=list)

    @property
    def packed(self) -> int:
        """Tokens of [prompt | clean | noisy]: no later block sees the last one."""
        return PROMPT + 2 * self.response - 4


SMALL = {"layers": 4, "hidden": 256, "heads": 4, "groups": 2, "head_dim": 64, "ffn": 768}
EVEN = SMALL | {"vocab": 4096, "tied": True}
WIDE = {"layers": 6, "hidden": 512, "heads": 8, "groups": 4, "head_dim": 64, "ffn": 1536}
VOCABULARY = SMALL | {"layers": 2, "vocab": 49152}
EXPERTS = {"experts": 8, "experts_per_token": 2, "expert_ffn": 192}
RECOMPUTE = "model.recompute=true"

DEFAULT = {
    "layers, everything kept": Case(shape=EVEN, sequences=4, response=256),
    "two replicas": Case(shape=EVEN | {"tied": False}, sequences=4, response=256, ranks=2),
}
SLOW = {
    "wide, recomputed": Case(
        shape=WIDE | {"vocab": 4096, "tied": False}, sequences=4, response=512, keys=[RECOMPUTE]
    ),
    "tied vocabulary": Case(shape=VOCABULARY | {"tied": True}, sequences=4, response=128),
    "untied vocabulary": Case(shape=VOCABULARY | {"tied": False}, sequences=4, response=128),
    "long response": Case(shape=EVEN, sequences=2, response=1200),
    "tensor ranks": Case(
        shape=WIDE | {"vocab": 8192, "tied": True},
        sequences=4,
        response=256,
        ranks=2,
        keys=["model.tensor_parallel=2"],
    ),
    "tensor ranks, sequence parallel, recomputed": Case(
        shape=WIDE | {"vocab": 4096, "tied": True},
        sequences=4,
        response=512,
        ranks=2,
        keys=["model.tensor_parallel=2", "model.sequence_parallel=true", RECOMPUTE],
    ),
    "pipeline stages": Case(
        shape=WIDE | {"vocab": 4096, "tied": True},
        sequences=8,
        response=128,
        ranks=2,
        keys=["model.pipeline_parallel=2"],
    ),
    "context ranks": Case(
        shape=EVEN, sequences=4, response=512, ranks=2, keys=["model.context_parallel=2"]
    ),
    "experts": Case(shape=EVEN | EXPERTS, sequences=4, response=256, model_type="qwen3_moe"),
    "expert ranks, recomputed": Case(
        shape=WIDE | EXPERTS | {"expert_ffn": 512, "vocab": 4096, "tied": True},
        sequences=4,
        response=256,
        model_type="qwen3_moe",
        ranks=2,
        keys=["model.expert_parallel=2", RECOMPUTE],
    ),
    "low rank": Case(
        shape=WIDE | {"vocab": 4096, "tied": True}, sequences=4, response=256, keys=["lora.rank=8"]
    ),
    "another family": Case(
        shape=EVEN, sequences=4, response=256, model_type="llama", keys=["loss.chunk_rows=512"]
    ),
    "16 bits": Case(
        shape=WIDE | {"vocab": 4096, "tied": True},
        sequences=4,
        response=256,
        keys=["model.dtype=bf16", "teacher.dtype=bf16"],
    ),
}
NOTHING = {
    "layers": 2,
    "hidden": 32,
    "heads": 2,
    "groups": 2,
    "head_dim": 16,
    "ffn": 32,
    "vocab": 67,
    "tied": True,
}


def arguments_of(case: Case, root: Path) -> list[str]:
    """A model, prompts and the keys of a step."""
    model = make_model(
        root / "model",
        case.model_type,
        seed=1,
        eos=[END],
        max_position_embeddings=4096,
        **case.shape,
    )
    prompts = root / "prompts.jsonl"
    row = json.dumps({"prompt_ids": [i % 40 for i in range(PROMPT)]})
    prompts.write_text(f"{row}\n" * case.sequences)
    return [
        f"model.path={model}",
        f"data.path={prompts}",
        f"train.out={root / 'run'}",
        f"model.mask_token_id={MASK}",
        f"rollout.prompts_per_step={case.sequences}",
        f"rollout.max_new_tokens={case.response}",
        "rollout.threshold=0",  # one pass a block, so that every token is masked in its state
        "curriculum.kind=constant",
        f"optimizer.batch_size={case.sequences // 2}",
        f"update.tokens_per_microbatch={2 * case.packed}",
        "train.steps=1",
        "logging.tensorboard=false",
        *case.keys,
    ]


def measured(server: ForkServer, case: Case, arguments: list[str], root: Path) -> int:
    """Bytes that the fullest rank takes more at its peak than before it began."""
    port, said = free_port(), root / "said"
    started = [
        server.fork(
            train_and_measure,
            output=said,
            environment=rank_environment(rank, case.ranks, port),
            arguments=arguments,
            start=root / f"start-{rank}",
        )
        for rank in range(case.ranks)
    ]
    for process in started:
        assert process.wait(timeout=300) == 0, said.read_text()[-3000:]
    (line,) = (root / "run" / "metrics.jsonl").read_text().splitlines()
    step = json.loads(line)
    assert step["loss_tokens"] == case.sequences * case.response
    starts = [json.loads((root / f"start-{rank}").read_text()) for rank in range(case.ranks)]
    return step["peak_memory_bytes"] - min(starts)


def estimated(case: Case, arguments: list[str]) -> RankMemory:
    config = load_config(None, arguments)
    split = split_of(config, case.ranks)
    source = open_model(config.model.path, "model.path", MASK)
    load = Load(prompt=PROMPT, response=case.response, sequences=case.sequences)
    return expected_memory(config, source, source, split, select_hardware(), load)


@pytest.fixture(scope="module")
def libraries(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], int]:
    """Bytes that a rank of a case takes for a model of no size in the same type."""

    @cache
    def taken(ranks: int, *types: str) -> int:
        root = tmp_path_factory.mktemp("nothing")
        case = Case(shape=NOTHING, sequences=4, response=16, ranks=ranks, keys=list(types))
        return measured(fork_server, case, arguments_of(case, root), root)

    return lambda case: taken(case.ranks, *(key for key in case.keys if "dtype" in key))


def check(server: ForkServer, case: Case, root: Path, libraries: int) -> None:
    arguments = arguments_of(case, root)
    peak = measured(server, case, arguments, root) - libraries
    memory = estimated(case, arguments)
    phase = memory.fullest
    shown = ", ".join(f"{name} {size / MIB:.0f}" for name, size in memory.sizes(phase).items())
    said = f"{memory.peak(phase) / MIB:.0f} MiB expected ({phase}: {shown}), {peak / MIB:.0f} taken"
    print(f"{memory.peak(phase) / peak:.3f}: {said}")
    assert peak > libraries, said  # what is compared outweighs what is taken away
    assert memory.peak(phase) == pytest.approx(peak, rel=TOLERANCE), said


@pytest.mark.parametrize("name", DEFAULT)
def test_the_peak_of_a_step(
    name: str, fork_server: ForkServer, tmp_path: Path, libraries: Callable[[Case], int]
):
    case = DEFAULT[name]
    check(fork_server, case, tmp_path, libraries(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_peak_of_other_shapes_and_layouts(
    name: str, fork_server: ForkServer, tmp_path: Path, libraries: Callable[[Case], int]
):
    case = SLOW[name]
    check(fork_server, case, tmp_path, libraries(case))
