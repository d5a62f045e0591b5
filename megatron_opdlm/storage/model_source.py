"""A model directory as it is opened: checked before anything slow, its weights not read yet."""

from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import (
    BlockContract,
    LowRank,
    huggingface_dir,
    is_checkpoint,
    read_manifest,
)
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import ModelShape, read_shape
from megatron_opdlm.model_files.vocabulary import load_tokenizer, read_vocabulary
from megatron_opdlm.records import Vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checked model directory: everything but the weights' values is known."""

    directory: Path
    shape: ModelShape
    vocabulary: Vocabulary
    contract: BlockContract | None  # of a Megatron checkpoint
    low_rank: LowRank | None  # terms that a Megatron checkpoint has beside its weights

    @property
    def files(self) -> Path:
        """Config and tokenizer."""
        return huggingface_dir(self.directory)


def open_model(
    path: str, key: str, mask_token_id: int | None = None, *, need_mask: bool = True
) -> ModelSource:
    """Check a Hugging Face directory or Megatron checkpoint. InputError names ``key``, the option
    that gave the path. ``need_mask`` False: of a model that reads no masked position, so that its
    vocabulary need not have a mask token.
    """
    if not path:
        raise InputError(
            f"{key} is empty: give a Hugging Face model directory or a Megatron checkpoint"
        )
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(
            f"{key}={path} is not a directory: give a Hugging Face model "
            "directory or a Megatron checkpoint"
        )
    manifest = read_manifest(directory) if is_checkpoint(directory) else None
    contract = manifest.block_contract if manifest else None
    files = huggingface_dir(directory)
    shape = read_shape(files)
    if contract is None:
        open_weights(
            directory, shape
        ).close()  # missing, truncated or misshaped tensors are found here
    vocabulary = read_vocabulary(
        files,
        mask_token_id if mask_token_id is not None or contract is None else contract.mask_token_id,
        need_mask=need_mask,
    )
    return ModelSource(
        directory=directory,
        shape=shape,
        vocabulary=vocabulary,
        contract=contract,
        low_rank=manifest.low_rank if manifest else None,
    )


def require_same_tokens(student: ModelSource, teacher: ModelSource) -> None:
    """Teacher and student must speak the same token ids."""
    if student.vocabulary.size != teacher.vocabulary.size:
        raise InputError(
            f"teacher.path={teacher.directory} has vocab_size={teacher.vocabulary.size}, "
            f"model.path={student.directory} has "
            f"{student.vocabulary.size}; use a teacher with the student's tokenizer"
        )
    pair = [load_tokenizer(source.files) for source in (student, teacher)]
    if all(tokenizer is not None for tokenizer in pair):
        ours, theirs = (
            {k: v for k, v in t.get_vocab().items() if v != student.vocabulary.mask_id}
            for t in pair
            if t is not None
        )
        if ours != theirs:
            raise InputError(
                f"teacher.path={teacher.directory} has another tokenizer than "
                f"model.path={student.directory}; "
                "use a teacher with the student's tokenizer"
            )
