"""Megatron-OPDLM: autoregressive -> block-diffusion language model by on-policy distillation.

    import megatron_opdlm as opdlm

    model = opdlm.load("checkpoints/student")

docs/python.md. PyTorch is imported when ``load`` is first asked for, not before.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names of ``api.py``, found when they are used (PEP 562): commands read this file, and most
    need no PyTorch.
    """
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("megatron_opdlm.api").load
