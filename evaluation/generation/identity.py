"""What an evaluation was made of, so that another attempt goes on with the same: short hashes of
its data and of its model.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.tasks import Row, Task
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.model_files.manifest import NAME as MANIFEST

_EDGE = 1 << 20  # bytes read of each end of a file of weights


def recorded_settings(
    tasks: Sequence[tuple[Task, list[Row]]],
    decoding: Decoding,
    responses_per_prompt: int,
    settings: dict[str, Any],
    enable_thinking: bool,
) -> dict[str, Any]:
    """What ``settings.json`` holds: all that decides the results, and the layout."""
    model = settings.get("model")
    return {
        "tasks": [task.name for task, _ in tasks],
        **settings,
        **decoding.asked,
        "responses_per_prompt": responses_per_prompt,
        "enable_thinking": enable_thinking,
        "data_hash": {task.name: hash_rows(rows) for task, rows in tasks},
        "model_hash": hash_model(Path(model)) if model else None,
    }


def hash_rows(rows: Sequence[Any]) -> str:
    """Of a task's rows, as they were read, or of other JSON values."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def hash_model(directory: Path) -> str:
    """Of a model directory: a checkpoint's manifest (it has the checksums of all files), else the
    JSON files and the ends of the files with weights, which hold their names, shapes and first and
    last values. Reads little, so that huge models are known at once.
    """
    if (directory / MANIFEST).is_file():
        return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".safetensors", ".json", ".jinja", ".txt") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(size - _EDGE, 0))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]
