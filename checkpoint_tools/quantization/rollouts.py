"""Recorded rollouts, as ``evaluation.sample`` and the training's ``samples.jsonl`` have them: what
a quantised export is calibrated on and compared on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.data.rows import Row, read_rows
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.prompts import check_vocabulary, render
from megatron_opdlm.records import Prompt, Trajectory

OPTION = "--calibration"
_LEAST_HELD_OUT = 4  # of so many different rollouts one is held out, at the least


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Different rollouts of one file: none is in both parts."""

    file: str  # its name
    calibration: tuple[Trajectory, ...]  # the first ones
    held_out: tuple[Trajectory, ...]  # the last ones


def read_rollouts(
    path: Path, files: Path, shape: ModelShape, *, calibration: int, held_out: int
) -> Rollouts:
    """The first ``calibration`` rollouts of a file and the last ``held_out``; of a short file at
    most a quarter is held out, and what is left calibrates. Equal rollouts count once.

    ``files`` has the tokenizer. Raises InputError with the line of the first row that is none.
    """
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Trajectory] = {}
    tokenizer = load_tokenizer(files)
    for row in read_rows(path, OPTION):
        try:
            trajectory = _trajectory(row, tokenizer, shape)
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from None
        key = tuple(trajectory.prompt.ids), tuple(trajectory.response_ids)
        found.setdefault(key, trajectory)
    rows = list(found.values())
    if len(rows) < 2:
        raise InputError(
            f"{OPTION}={path}: {len(rows)} different rollout; give at least 2, since those that "
            "calibrate are not those that the result is compared on"
        )
    last = min(held_out, max(1, len(rows) // _LEAST_HELD_OUT))
    first = min(calibration, len(rows) - last)
    return Rollouts(
        file=path.name,
        calibration=tuple(rows[:first]),
        held_out=tuple(rows[len(rows) - last :]),
    )


def _trajectory(row: Row, tokenizer: Any, shape: ModelShape) -> Trajectory:
    """Without ``committed_at`` no passes are known, and states are masked at random."""
    prompt = _prompt(row.fields, tokenizer)
    response = _ids(row.fields, "response_ids", "rollouts as evaluation.sample writes them")
    if not prompt or not response:
        raise InputError("the prompt or the response is empty; leave the row out")
    check_vocabulary([*prompt, *response], shape.vocab_size)
    length = len(prompt) + len(response)
    if length > shape.max_positions:
        raise InputError(
            f"{length} tokens exceed the model's {shape.max_positions} positions; leave it out"
        )
    passes = []
    if "committed_at" in row.fields:
        passes = _ids(row.fields, "committed_at", "one pass a token")
        if len(passes) != len(response) or min(passes) < 1:
            raise InputError(
                f"committed_at has {len(passes)} entries for {len(response)} response_ids; give "
                "the pass of each token, from 1, or leave the key out"
            )
    return Trajectory(
        sample=row.index,
        prompt=Prompt(index=row.index, ids=prompt),
        response_ids=response,
        committed_at=passes,
        response_tokens=len(response),
        finish_reason="",
        forwards=0,
        passes=0,
        off_policy=not passes,
    )


def _prompt(fields: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if "prompt_ids" in fields:
        return _ids(fields, "prompt_ids", "token ids")
    if tokenizer is None:
        raise InputError("the model has no tokenizer; give prompt_ids")
    return render(fields, tokenizer, False)


def _ids(fields: Mapping[str, Any], key: str, what: str) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise InputError(f"{key} is missing or no list of whole numbers; give {what}")
    return value
