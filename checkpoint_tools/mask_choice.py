"""Which token becomes the mask of an imported model: the one that its files name, one that the
command line names, or a new one.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.shape import read_json, read_shape
from megatron_opdlm.model_files.vocabulary import (
    MASK_TEXTS,
    end_tokens,
    free_id,
    known_mask_token,
    load_tokenizer,
    names_end_token,
    own_mask_id,
    pad_token,
)


@dataclass(frozen=True, kw_only=True)
class MaskChoice:
    """The mask token of a checkpoint that is being made."""

    id: int | None  # None: not known yet, training has to say
    text: str | None = None  # to be registered in the tokenizer under; None: as it is
    added: bool = False  # it gets a row of its own behind the vocabulary


def choose_mask(
    hf_dir: Path, *, token_id: int | None = None, text: str | None = None, add: bool = False
) -> MaskChoice:
    """The mask token by at most one of the options of ``import_hf``. Raises InputError for what
    cannot be one, or need not.
    """
    if text is None and not add:
        return MaskChoice(id=known_mask_token(hf_dir, token_id))
    tokenizer = load_tokenizer(hf_dir)
    option = "--add-mask-token" if add else f"--mask-token {text}"
    own = own_mask_id(tokenizer, recorded := read_json(hf_dir / "config.json").get("mask_token_id"))
    if own is not None or recorded is not None:
        raise InputError(
            f"{option}: {hf_dir} has its mask token already, at "
            f"{recorded if own is None else own}; leave the option out"
        )
    words = {} if tokenizer is None else tokenizer.get_vocab()
    if not add:
        assert text is not None
        return MaskChoice(id=_existing(hf_dir, words, text), text=text)
    vocab_size = read_shape(hf_dir).vocab_size
    free = free_id(tokenizer, vocab_size) if words else None
    if free is not None:
        raise InputError(
            f"{option}: {hf_dir} has a row that is no token, {free}; use --mask-token-id {free}"
        )
    new = next((one for one in MASK_TEXTS if one not in words), None)
    if new is None:
        raise InputError(
            f"{option}: {', '.join(MASK_TEXTS)} are tokens of {hf_dir} already; name one that is "
            "not used with --mask-token"
        )
    return MaskChoice(id=vocab_size, text=new, added=True)


def _existing(hf_dir: Path, words: dict[str, int], text: str) -> int:
    found = words.get(text)
    if found is None:
        raise InputError(
            f"--mask-token {text}: the tokenizer of {hf_dir} has no such token; name one that it "
            "has and that no text uses, or use --add-mask-token"
        )
    used = {*end_tokens(hf_dir), pad_token(hf_dir)} if names_end_token(hf_dir) else set()
    if found in used:
        raise InputError(
            f"--mask-token {text} ends or pads the model's responses (id {found}); name a token "
            "that no text uses, or use --add-mask-token"
        )
    return found
