"""What all tests of a session share: tiny models and groups of ranks."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.workers import WorkerGroups
from tests.forking import ForkServer
from tests.tiny_models import make_model, make_qwen3

SEEDS = {"student": 11, "teacher": 12}
VOCABULARY = 67  # odd: every tensor-parallel layout pads it
LAST_TOKEN = 48  # of the tokenizer; the model's rows above are free
END_IDS = (48, 46)  # <|im_end|> and <|endoftext|>, as generation_config.json has them
MASK = 64


@dataclass
class TinyModels:
    """Random model directories by role: different weights, the same tokenizer."""

    root: Path
    model_type: str = "qwen3"
    keys: dict[str, Any] = field(default_factory=dict)  # more of config.json
    _made: dict[str, Path] = field(default_factory=dict)

    def experts(self, role: str, *, renormalize: bool = True) -> Path:
        """A Qwen3-MoE of two layers of six experts, of which a token has two."""
        name = f"{role}-experts-{renormalize}"
        if name not in self._made:
            self._made[name] = make_qwen3(
                self.root / name,
                tied=not renormalize,
                seed=SEEDS[role],
                vocab=VOCABULARY,
                layers=2,
                experts=6,
                renormalize=renormalize,
            )
        return self._made[name]

    def hf(self, role: str, *, tied: bool, layers: int = 4) -> Path:
        """Hugging Face directory of the ``student`` or the ``teacher``."""
        name = f"{role}-{'tied' if tied else 'untied'}-{layers}"
        if name not in self._made:
            self._made[name] = make_model(
                self.root / name,
                self.model_type,
                tied=tied,
                seed=SEEDS[role],
                vocab=VOCABULARY,
                layers=layers,
                **self.keys,
            )
        return self._made[name]

    def imported(self, role: str, *, tied: bool) -> Path:
        """The same as a Megatron checkpoint, made by ``import_hf``."""
        from checkpoint_tools.import_hf import convert
        from megatron_opdlm.model_files.manifest import BlockContract
        from megatron_opdlm.model_files.safetensors_dir import open_weights

        hf_dir = self.hf(role, tied=tied)
        out = hf_dir.with_name(hf_dir.name + "-megatron")
        if not out.exists():
            with open_weights(hf_dir) as weights:
                convert(weights, out, BlockContract(mask_token_id=MASK), "fp32")
        return out


@pytest.fixture(scope="module", autouse=True)
def swept() -> None:
    """What is imported by now lives on: no garbage collection need look at it. Megatron asks for
    one whenever it saves, and nested JSON for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Everything that takes seconds to import is imported in it once."""
    server = ForkServer(
        ["tests.distributed.jobs", "tests.faults.disturbed", "evaluation.in_training"]
    )
    yield server
    server.close()


@pytest.fixture(scope="session")
def ranks(fork_server: ForkServer) -> Iterator[WorkerGroups]:
    """``ranks(2).run(function, **arguments)``: a function on both ranks of a running group."""
    groups = WorkerGroups(fork_server)
    yield groups
    groups.close()


@pytest.fixture(scope="session")
def forks(fork_server: ForkServer) -> Iterator[WorkerGroups]:
    """Groups whose ranks never run a model themselves: they fork the ranks of jobs."""
    groups = WorkerGroups(fork_server)
    yield groups
    groups.close()
