"""What a run directory records, in the form that the page draws: columns of numbers by name, and
responses with the pass at which each token was committed. Runs that still go on are read too.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from megatron_opdlm.data.json_text import problem
from megatron_opdlm.errors import InputError
from megatron_opdlm.metrics import EVALUATION, METRICS, SAMPLES, scalars
from megatron_opdlm.model_files.manifest import CONFIG

POINTS = 1000  # of a curve at the most: more than a screen has pixels for
RESPONSES = 60  # of a run at the most, so that the page stays small

Columns = dict[str, list[float | None]]


def is_run(directory: Path) -> bool:
    """Whether a directory is one of ``train.out``."""
    return (directory / METRICS).is_file()


def read_run(directory: Path, name: str) -> dict[str, Any]:
    """A run directory as the page's data. InputError where it holds no training step."""
    file = directory / METRICS
    if not is_run(directory):
        raise InputError(f"{directory}: holds no {METRICS}; give the directory of train.out")
    steps = read_lines(file)
    if not steps:
        raise InputError(f"{file}: no training step is recorded yet; wait for the first one")
    block_size, alignment = _blocks_of(directory / CONFIG)
    samples = spread(read_lines(directory / SAMPLES), RESPONSES)
    return {
        "name": name,
        "steps": len(steps),
        "columns": columns(spread(steps, POINTS)),
        "evaluation": columns(
            {"step": row["step"], **_accuracies(row)} for row in read_lines(directory / EVALUATION)
        ),
        "samples": [response(row, block_size, alignment) for row in samples],
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that may be absent; a last line without its end is being written
    and is left out. InputError names the line.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{file} line {number}: not JSON ({problem(error)}); restore the file"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{file} line {number}: no object with a step; restore the file")
        rows.append(row)
    return rows


def spread(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most ``most`` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def columns(rows: Any) -> Columns:
    """Rows as columns by tag (``kl_by_masked_fraction/0.50``); None where a row lacks it. Six
    digits: a picture has no more.
    """
    flat = [dict(scalars(row)) for row in rows]
    tags = list(dict.fromkeys(tag for row in flat for tag in row))
    return {tag: [float(f"{row[tag]:.6g}") if tag in row else None for row in flat] for tag in tags}


def _accuracies(row: Mapping[str, Any]) -> dict[str, Any]:
    return {task: result.get("accuracy") for task, result in row.get("tasks", {}).items()}


def response(row: Mapping[str, Any], block_size: int, alignment: str) -> dict[str, Any]:
    """A line of ``samples.jsonl`` with, for each response token, its block and its pass counted
    over the whole response: the blocks are denoised one after the other.
    """
    committed = row["committed_at"]
    offset = len(row["prompt_ids"]) % block_size if alignment == "absolute" else 0
    blocks = [(offset + position) // block_size for position in range(len(committed))]
    passes = [0] * (max(blocks, default=-1) + 1)
    for block, at in zip(blocks, committed, strict=True):
        passes[block] = max(passes[block], at)
    before = [0, *accumulate(passes)]
    ids = row["response_ids"]
    return {
        "step": row["step"],
        "sample": row["sample"],
        "prompt": row.get("prompt", " ".join(map(str, row["prompt_ids"]))),
        "finish_reason": row["finish_reason"],
        "response_tokens": row["response_tokens"],
        "forwards": row["forwards"],
        "ids": ids,
        # Without texts (recorded before they were, or no tokenizer) the ids are shown.
        "texts": row.get("response_texts") or [f"{token} " for token in ids],
        "blocks": blocks,
        "committed_at": committed,
        **{key: row.get(key) for key in ("confidence", "kl", "teacher")},
        "passes_of_block": passes,
        "passes": [before[block] + at for block, at in zip(blocks, committed, strict=True)],
    }


def _blocks_of(file: Path) -> tuple[int, str]:
    """Block size and alignment of the run's configuration."""
    if not file.is_file():
        raise InputError(f"{file}: missing; give the whole directory that a training run made")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config["rollout"]["block_size"], config["states"].get("block_alignment", "absolute")
