"""Shapes of the published Qwen3 models, for a dry run before any weights are on disk.

``configs/shapes/NAME/config.json`` holds the keys of the public configuration that decide shapes
and arithmetic. A path means the model whose name its last part is, whatever its case:
``Qwen/Qwen3-8B``, ``checkpoints/qwen3-8b``.
"""

from pathlib import Path

from megatron_opdlm.model_files.shape import ModelShape, read_shape
from megatron_opdlm.records import Vocabulary

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"

# Of every published Qwen3: <|im_end|> and <|endoftext|> end a response, the first unused row of the
# embedding becomes the mask token.
END_IDS, PAD_ID, MASK_ID = (151645, 151643), 151643, 151669


def public_names() -> list[str]:
    """The models whose shapes are known."""
    return sorted(directory.name for directory in SHAPES.iterdir())


def public_name(path: str) -> str | None:
    """The published model that a path is named after; None: it is named after none."""
    last = Path(path).name.lower()
    return next((name for name in public_names() if name.lower() == last), None)


def public_shape(name: str) -> ModelShape:
    return read_shape(SHAPES / name)


def public_vocabulary(shape: ModelShape, mask_token_id: int | None) -> Vocabulary:
    """Roles of the ids in every published Qwen3; ``mask_token_id`` None: 151669."""
    return Vocabulary(
        size=shape.vocab_size,
        mask_id=MASK_ID if mask_token_id is None else mask_token_id,
        end_ids=END_IDS,
        pad_id=PAD_ID,
        forbidden_ids=(),
    )
