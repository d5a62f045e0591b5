"""Small JSON files that a run keeps about itself."""

import json
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError


def read_record(file: Path, kind: type, remedy: str) -> Any:
    """The ``kind`` (dict or list) in a file. InputError with ``remedy`` where a power cut, a full
    disk or an editor has left something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); {remedy}") from None
    if not isinstance(content, kind):
        raise InputError(f"{file} is damaged (it holds no {kind.__name__}); {remedy}")
    return content
