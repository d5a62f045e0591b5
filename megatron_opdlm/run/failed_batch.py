"""What an update was made on that gave no finite loss or gradient, kept for ``replay``.

``train.out/failed/step_NNNNNNN/`` holds the states of all replicas as ``trajectories.jsonl``, the
student's weights from before the update as the checkpoint ``student/``, the run's ``config.yaml``
and a ``README.md`` with the command.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm import parallel
from megatron_opdlm.checkpoint import Checkpoints, save_weights
from megatron_opdlm.errors import RunError
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model_files.huggingface_files import carry_over
from megatron_opdlm.model_files.manifest import CONFIG, HUGGINGFACE, WEIGHTS, write_manifest
from megatron_opdlm.model_files.writing import publish
from megatron_opdlm.records import State

TRAJECTORIES, STUDENT, README = "trajectories.jsonl", "student", "README.md"


@dataclass(frozen=True, kw_only=True)
class FailedBatch:
    """One update that failed; ``states`` are this replica's."""

    step: int
    states: Sequence[State]
    reason: str
    teacher: Path  # directory of the teacher's weights

    def save(self, run: Path, student: LanguageModel, checkpoints: Checkpoints) -> Path:
        """Write it whole or not at all, all ranks together; RunError where that fails."""
        final = run / "failed" / f"step_{self.step:07d}"
        temporary = final.with_name(f".{final.name}.tmp")
        pairs = [(state.sample, row_of(state)) for state in self.states]
        pairs = sorted(parallel.gather_objects_over_data_parallel(pairs), key=lambda pair: pair[0])
        _on_writer(lambda: self._describe(temporary, final, pairs, checkpoints))
        save_weights(student, temporary / STUDENT / WEIGHTS)
        parallel.barrier()
        _on_writer(lambda: _finish(temporary, final, checkpoints))
        return final

    def _describe(
        self, temporary: Path, final: Path, pairs: Sequence[tuple], checkpoints: Checkpoints
    ) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / STUDENT).mkdir(parents=True)
        carry_over(checkpoints.source, temporary / STUDENT / HUGGINGFACE)
        lines = [json.dumps(row) + "\n" for _, row in pairs]
        (temporary / TRAJECTORIES).write_text("".join(lines))
        (temporary / CONFIG).write_text(checkpoints.config_yaml)
        (temporary / README).write_text(self._readme(final, [sample for sample, _ in pairs]))

    def _readme(self, final: Path, samples: Sequence[int]) -> str:
        command = [
            *("torchrun", "--nproc-per-node", "1", "-m", "megatron_opdlm.replay"),
            *("--config", final / CONFIG, "--student", final / STUDENT),
            *("--teacher", self.teacher, "--trajectories", final / TRAJECTORIES),
            *("--out", final / "replay.json"),
        ]
        numbers = ", ".join(map(str, samples))
        return (
            f"# An update of step {self.step} that failed\n\n{self.reason}\n\n"
            f"`{TRAJECTORIES}` holds the {len(samples)} sequences of the update as the student "
            f"read them, samples {numbers} in this order (`replay` counts lines from 0). "
            f"`{STUDENT}/` holds the weights from before the update. This computes the loss again, "
            "on any layout (add `model.tensor_parallel=...` and more ranks):\n\n"
            f"    {shlex.join(map(str, command))}\n"
        )


def row_of(state: State) -> dict[str, list[int]]:
    """A state as a line that ``replay`` reads."""
    return {
        "prompt_ids": list(state.prompt_ids),
        "response_ids": list(state.response_ids),
        "masked": [int(masked) for masked in state.masked],
    }


def _finish(temporary: Path, final: Path, checkpoints: Checkpoints) -> None:
    write_manifest(
        temporary / STUDENT,
        kind="model",
        dtype=checkpoints.dtype,
        block_contract=checkpoints.block_contract,
        low_rank=checkpoints.low_rank,
    )
    shutil.rmtree(final, ignore_errors=True)  # the same step failed before
    publish(temporary, final)


def _on_writer(action: Callable[[], None]) -> None:
    problem = parallel.on_writer(action)
    if problem is not None:
        raise RunError(f"the batch could not be saved ({problem})")
