"""Shapes of published models, for a dry run before any weights are on disk.

``configs/shapes/NAME/config.json`` holds the keys of the public configuration that decide shapes
and arithmetic, and the tokens that end and pad a response. A path means the model whose name its
last part is, whatever its case: ``Qwen/Qwen3-8B``, ``checkpoints/qwen3-8b``.
"""

from pathlib import Path

from megatron_opdlm.model_files.shape import ModelShape, read_shape
from megatron_opdlm.model_files.vocabulary import QWEN_MASK_ID, end_tokens, pad_token
from megatron_opdlm.records import Vocabulary

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


def public_names() -> list[str]:
    """The models whose shapes are known."""
    return sorted(directory.name for directory in SHAPES.iterdir())


def public_name(path: str) -> str | None:
    """The published model that a path is named after; None: it is named after none."""
    last = Path(path).name.lower()
    return next((name for name in public_names() if name.lower() == last), None)


def public_shape(name: str) -> ModelShape:
    return read_shape(SHAPES / name)


def public_vocabulary(name: str, mask_token_id: int | None) -> Vocabulary:
    """Roles of a published model's ids. ``mask_token_id`` None: 151669, or where that has no room
    the last row in place of the one that the import will choose.
    """
    size = public_shape(name).vocab_size
    return Vocabulary(
        size=size,
        mask_id=min(QWEN_MASK_ID, size - 1) if mask_token_id is None else mask_token_id,
        end_ids=tuple(end_tokens(SHAPES / name)),
        pad_id=pad_token(SHAPES / name),
        forbidden_ids=(),
    )
