"""Which layouts (rows of families.py) a model and its block contract can be exported in."""

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import FORMATS, Family, HFLayout
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.model_files.shape import ModelShape

FLAG = "--format "  # what the export's command calls it; keys have their own names


def layout_of(name: str, family: Family, flag: str = FLAG) -> HFLayout:
    """The family's layout in the format ``name``. Raises InputError where it has none."""
    if name not in family.formats:
        reason = "is for other models" if name in FORMATS else "is no format of an export"
        if name == "sdar":
            reason = "has readers that norm queries and keys, which this model does not"
        elif family.experts and name in FORMATS:
            reason = "has readers that know no mixture of experts"
        raise InputError(
            f"{flag}{name} {reason}: it is a {family.name}; use {flag}"
            + " or ".join(family.formats)
        )
    return family.formats[name]


def check_format(name: str, contract: BlockContract, shape: ModelShape, flag: str = FLAG) -> None:
    """Refuse what readers of the format would decode otherwise than it was trained."""
    layout, plain = layout_of(name, shape.family, flag), shape.family.plain.format
    if not layout.has_code:
        return
    if contract.mask_token_id is None:
        raise InputError(
            f"{flag}{name}: the checkpoint has no mask token; train it with "
            "model.mask_token_id, or import it again with --mask-token-id"
        )
    if contract.logit_shift:
        raise InputError(
            f"{flag}{name}: the model was trained with loss.logit_shift=true, which readers of "
            f"this format do not know; use {flag}{plain}"
        )
    if contract.block_alignment != "absolute":
        raise InputError(
            f"{flag}{name}: the model was trained with "
            f"block_alignment={contract.block_alignment}, but readers of this format count blocks "
            f"from position 0; use {flag}{plain}"
        )
