"""Exports for tests: a tiny model, imported and written in a format."""

from pathlib import Path
from typing import Any

from checkpoint_tools import export_hf, import_hf
from megatron_opdlm.model_files.manifest import BlockContract, read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from tests.tiny_models import make_qwen3

CONTRACT = BlockContract(mask_token_id=64, block_size=4)


def make_export(root: Path, **options: Any) -> Path:
    """``root/export``, from ``root/checkpoint``; ``options`` of ``export_hf.convert``."""
    source = make_qwen3(root / "source", tied=True, seed=3, layers=1)
    with open_weights(source) as weights:
        import_hf.convert(weights, root / "checkpoint", CONTRACT, "fp32")
    manifest, shape = read_manifest(root / "checkpoint"), read_shape(source)
    export_hf.convert(root / "checkpoint", root / "export", manifest, shape, **options)
    return root / "export"
