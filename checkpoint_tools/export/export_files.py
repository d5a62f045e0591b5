"""Everything of an export that is not weights: configuration, code, tokenizer, generation config,
engine settings and model card.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.export.engine_settings import engine_settings, write_engine_settings
from checkpoint_tools.export.hf_files import (
    DEFAULT_BLOCK_SIZE,
    export_config,
    write_generation_config,
)
from checkpoint_tools.export.mask_registration import register_mask, write_for_transformers_4
from checkpoint_tools.export.model_card import model_card
from checkpoint_tools.export.own_code import copy_code
from checkpoint_tools.export.training_record import read_training_record
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import HFLayout
from megatron_opdlm.model_files.huggingface_files import carry_over
from megatron_opdlm.model_files.manifest import HUGGINGFACE, BlockContract
from megatron_opdlm.model_files.shape import ModelShape, read_json
from megatron_opdlm.model_files.vocabulary import forbidden_ids, names_end_token
from megatron_opdlm.model_files.writing import write_json


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card can only know from the command that makes it."""

    base_model: str = (
        ""  # name of the pretrained model; empty: as the training configuration has it
    )
    evaluation: tuple[dict[str, Any], ...] = ()  # rows of summary.json files
    quantized: bool = False


def write_files(
    directory: Path,
    checkpoint: Path,
    contract: BlockContract,
    shape: ModelShape,
    *,
    layout: HFLayout,
    dtype: str,
    card: CardFacts,
) -> None:
    """Fill ``directory`` with all files of the export but the weights.

    ``shape`` is the export's. Raises InputError where the tokenizer has no room for the mask token,
    and where a format that decodes blocks has no end token.
    """
    source, record = checkpoint / HUGGINGFACE, read_training_record(checkpoint)
    if layout.has_code and not names_end_token(source):
        raise InputError(
            f"--format {layout.format}: {checkpoint} names no end token, which decoding needs; "
            "set eos_token_id in the model's generation_config.json and import it again, or use "
            f"--format {shape.family.plain.format}"
        )
    carry_over(source, directory)
    config = export_config(
        read_json(source / "config.json"),
        shape,
        contract,
        forbidden_ids(source, contract.mask_token_id),
        layout=layout,
        dtype=dtype,
        trained_thresholds=record.thresholds,
    )
    write_json(directory / "config.json", config)
    copy_code(layout, directory)
    write_for_transformers_4(directory)
    write_generation_config(directory)
    if contract.mask_token_id is not None:
        register_mask(directory, contract.mask_token_id)
    settings = engine_settings(contract.block_size or DEFAULT_BLOCK_SIZE, record)
    if layout.served:
        write_engine_settings(directory, settings)
    (directory / "README.md").write_text(
        model_card(
            shape,
            contract,
            record,
            settings,
            layout=layout,
            dtype=dtype,
            base_model=card.base_model,
            evaluation=card.evaluation,
            quantized=card.quantized,
        ),
        encoding="utf-8",
    )
