"""What ``state.json`` of a training checkpoint holds: the counters of a run, and what the rest of
its state is a function of.

Order and position in the data, random numbers, learning rate, curriculum and thresholds are pure
functions of the step, the configuration, the seed and the prompts. So the first two are stored, and
the others are compared.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.shape import read_json
from megatron_opdlm.records import Prompt

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run has done. All else (data order, schedules, random numbers) is a pure function of
    the step and the seed.
    """

    step: int = 0  # steps done
    cumulative_trained_tokens: int = 0
    cumulative_rollout_tokens: int = 0
    cumulative_flops: float = 0.0
    cumulative_flops_paper: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What data order, draws and schedules depend on beside step and configuration."""

    seed: int  # of all random numbers: the key of each is (seed, step, ...)
    prompts: int  # usable ones of the data file
    prompts_sha256: str  # of their tokens and recorded responses, in the file's order

    @classmethod
    def of(cls, prompts: Sequence[Prompt], seed: int) -> Self:
        """The identity of a run over these prompts."""
        digest = hashlib.sha256()
        for prompt in prompts:
            response = prompt.response_ids
            parts = prompt.ids, response or [], [len(prompt.ids), -1 if response is None else 1]
            digest.update(b"".join(array("q", part).tobytes() for part in parts))
        return cls(seed=seed, prompts=len(prompts), prompts_sha256=digest.hexdigest())


def write_state(
    directory: Path, progress: Progress, identity: RunIdentity | None, tracker_run_id: str | None
) -> None:
    """Write ``state.json`` into a checkpoint that is not published yet."""
    state = asdict(progress) | {
        "identity": None if identity is None else asdict(identity),
        "tracker_run_id": tracker_run_id,
    }
    (directory / STATE).write_text(json.dumps(state, indent=2) + "\n")


def is_of_run(checkpoint: Path, identity: RunIdentity | None) -> bool:
    """Whether a directory holds the state of a run with this identity (None: of any)."""
    try:
        stored = read_json(checkpoint / STATE).get("identity")
    except (InputError, OSError):
        return False
    return stored is None or identity is None or stored == asdict(identity)


def read_state(checkpoint: Path, identity: RunIdentity | None) -> tuple[Progress, str | None]:
    """Counters and the tracker's run id. InputError where the checkpoint belongs to a run over
    other prompts: it would go on with an order of the data that it never had.
    """
    state: dict[str, Any] = read_json(checkpoint / STATE)
    stored: dict[str, Any] | None = state.get("identity")
    if stored is not None and identity is not None and stored != asdict(identity):
        raise InputError(
            f"data.path has {identity.prompts} usable prompts that are not the "
            f"{stored.get('prompts')} that {checkpoint} was trained on; resume with the same data, "
            "or start another run with that checkpoint as model.path"
        )
    progress = Progress(**{item.name: state[item.name] for item in fields(Progress)})
    return progress, state.get("tracker_run_id")
