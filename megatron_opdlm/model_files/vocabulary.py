"""Which ids mean what: the mask token, the end tokens, padding, and how far the tokenizer's ids
reach.

Every function takes a Hugging Face directory or the ``huggingface/`` part of a Megatron checkpoint.
Weights are not needed. A model without any tokenizer file is legal (prompts are then token ids).
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import BY_TYPE, QWEN3
from megatron_opdlm.model_files.file_kinds import foreign_kind
from megatron_opdlm.model_files.shape import read_json, read_shape
from megatron_opdlm.records import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A row that is no token in the padded vocabularies of Qwen2.5 and Qwen3, of the latter the first
# one.
QWEN_MASK_ID = 151669
NO_MASK = -1
MASK_TEXT = "<|MASK|>"
MASK_TEXTS = (MASK_TEXT, "<|mask|>", "<MASK>", "<mask>", "[MASK]")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_tokenizer(hf_dir: Path) -> "PreTrainedTokenizerBase | None":
    """The directory's tokenizer, or None when it has no tokenizer file. Never runs code from the
    directory.

    The configuration is passed as a plain one of the family, so that exported model types that
    transformers does not know (their classes ship with the model) do not stop it.
    """
    hf_dir = Path(hf_dir)
    if not any((hf_dir / name).is_file() for name in TOKENIZER_FILES):
        return None
    stamp = tuple(path.stat().st_mtime_ns for path in sorted(hf_dir.iterdir()) if path.is_file())
    return _load_tokenizer(hf_dir, stamp)


@lru_cache(maxsize=8)
def _load_tokenizer(hf_dir: Path, stamp: tuple[int, ...]) -> "PreTrainedTokenizerBase":
    """``stamp`` (times of change) makes an edited directory load again."""
    import transformers

    described = hf_dir / "config.json"
    model_type = read_json(described).get("model_type") if described.is_file() else None
    family = BY_TYPE.get(str(model_type), QWEN3)
    plain = getattr(transformers, f"{family.transformers}Config")()
    for name in TOKENIZER_FILES:
        kind = foreign_kind(hf_dir / name) if (hf_dir / name).is_file() else None
        if kind is not None:
            raise InputError(f"{hf_dir / name} is {kind}")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(hf_dir), config=plain, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever its parsers raise on a broken file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{hf_dir}: its tokenizer does not load ({type(error).__name__}: {reason}); "
            "copy the tokenizer files again"
        ) from None


def mask_token(hf_dir: Path | str, override: int | None = None) -> int:
    """Id of the mask token: the tokenizer's (registered as such, or added under one of the usual
    texts), else ``override`` (``model.mask_token_id``), else the one that config.json records (our
    imports and exports do), else 151669, which Qwen's have free.

    Raises InputError when the vocabulary has no room for it, when the id is an ordinary token, and
    when two of these say different things.
    """
    hf_dir = Path(hf_dir)
    vocab_size = read_shape(hf_dir).vocab_size
    tokenizer = load_tokenizer(hf_dir)
    _refuse_larger(hf_dir, tokenizer, vocab_size)
    recorded = read_json(hf_dir / "config.json").get("mask_token_id")
    own = own_mask_id(tokenizer, recorded)
    if tokenizer is not None and own is not None and recorded not in (None, own):
        raise InputError(
            f"{hf_dir}: config.json has mask_token_id={recorded!r}, but its tokenizer has the mask "
            f"token {tokenizer.convert_ids_to_tokens(own)!r} at {own}; correct the one that the "
            "model was not trained with"
        )
    if tokenizer is not None and own is not None and override not in (None, own):
        raise InputError(
            f"model.mask_token_id={override}, but the tokenizer of {hf_dir} has its mask token "
            f"{tokenizer.convert_ids_to_tokens(own)!r} at {own}; remove the option"
        )
    if own is None and recorded is not None and override not in (None, recorded):
        raise InputError(
            f"model.mask_token_id={override}, but {hf_dir} was made with mask_token_id={recorded}; "
            "remove the option"
        )
    candidates = [value for value in (own, override, recorded) if value is not None]
    mask = candidates[0] if candidates else QWEN_MASK_ID
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < vocab_size:
        raise InputError(_no_room(hf_dir, mask, vocab_size, tokenizer, chosen=bool(candidates)))
    if own is None and tokenizer is not None:
        _refuse_ordinary_token(hf_dir, mask, tokenizer, vocab_size)
    return mask


def _refuse_larger(
    hf_dir: Path, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int
) -> None:
    """InputError where the tokenizer has tokens that the model has no rows for."""
    last = max(tokenizer.get_vocab().values(), default=0) if tokenizer is not None else 0
    if last >= vocab_size:
        raise InputError(
            f"{hf_dir}: the tokenizer has tokens up to id {last}, but the model's vocab_size="
            f"{vocab_size}; use the tokenizer that belongs to the model"
        )


def own_mask_id(tokenizer: "PreTrainedTokenizerBase | None", recorded: object = None) -> int | None:
    """The tokenizer's mask token; published models have it registered, or only added. Where several
    of the usual texts are added, it is the one at the ``recorded`` id.
    """
    if tokenizer is None:
        return None
    typeless: Any = tokenizer  # its ids are typed for multimodal models
    if typeless.mask_token_id is not None:
        return typeless.mask_token_id
    added: dict[str, int] = typeless.get_added_vocab()
    found = [added[text] for text in MASK_TEXTS if text in added]
    return next((value for value in found if value == recorded), next(iter(found), None))


def known_mask_token(hf_dir: Path | str, override: int | None = None) -> int | None:
    """As ``mask_token``, but None where nothing names it yet and the vocabulary has a free id.

    So a toy model can be imported before ``model.mask_token_id`` is chosen.
    """
    hf_dir = Path(hf_dir)
    tokenizer = load_tokenizer(hf_dir)
    vocab_size = read_shape(hf_dir).vocab_size
    _refuse_larger(hf_dir, tokenizer, vocab_size)
    named = (
        override is not None
        or own_mask_id(tokenizer) is not None
        or read_json(hf_dir / "config.json").get("mask_token_id") is not None
        or vocab_size > QWEN_MASK_ID
    )
    if not named and free_id(tokenizer, vocab_size) is not None:
        return None
    return mask_token(hf_dir, override)


def forbidden_ids(hf_dir: Path | str, mask_id: int | None) -> tuple[int, ...]:
    """Ids that are never drawn, rising: the mask token and all that the tokenizer does not know.

    Without a tokenizer only the mask token.
    """
    vocab_size = read_shape(Path(hf_dir)).vocab_size
    tokenizer = load_tokenizer(Path(hf_dir))
    known = set(range(vocab_size) if tokenizer is None else tokenizer.get_vocab().values())
    return tuple(i for i in range(vocab_size) if i == mask_id or i not in known)


def read_vocabulary(
    hf_dir: Path | str, mask_override: int | None = None, *, need_mask: bool = True
) -> Vocabulary:
    """Every id with a role, as the record that rollout and evaluation take.

    ``need_mask`` False is for autoregressive decoding of a model without a mask token: its id is
    then ``NO_MASK``, which is no token.
    """
    mask_id = mask_token(hf_dir, mask_override) if need_mask else NO_MASK
    return Vocabulary(
        size=read_shape(Path(hf_dir)).vocab_size,
        mask_id=mask_id,
        end_ids=tuple(end_tokens(hf_dir)),
        pad_id=pad_token(hf_dir),
        forbidden_ids=forbidden_ids(hf_dir, mask_id),
    )


def names_end_token(hf_dir: Path | str) -> bool:
    """Whether anything names an end token: weights alone can be converted without one."""
    return _configured(Path(hf_dir), "eos_token_id") not in (None, [])


def end_tokens(hf_dir: Path | str) -> list[int]:
    """All ids of ``generation_config.eos_token_id``, else of config.json's, else the tokenizer's
    end token.
    """
    hf_dir = Path(hf_dir)
    vocab_size = read_shape(hf_dir).vocab_size
    found = _configured(hf_dir, "eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not ids:
        raise InputError(f"{hf_dir} names no end token; set eos_token_id in generation_config.json")
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise InputError(
                f"{hf_dir}: eos_token_id={value!r} is no id below vocab_size={vocab_size}; correct "
                "generation_config.json"
            )
    return list(dict.fromkeys(ids))


def pad_token(hf_dir: Path | str) -> int:
    """Id that fills what nobody reads: the configured pad token, else the first end token."""
    hf_dir = Path(hf_dir)
    found, vocab_size = _configured(hf_dir, "pad_token_id"), read_shape(hf_dir).vocab_size
    if found is None:
        return end_tokens(hf_dir)[0]
    if type(found) is not int or not 0 <= found < vocab_size:
        raise InputError(
            f"{hf_dir}: pad_token_id={found!r} is no id below vocab_size={vocab_size}; correct "
            "generation_config.json"
        )
    return found


def _configured(hf_dir: Path, key: str) -> Any:
    for file in ("generation_config.json", "config.json"):
        if (hf_dir / file).is_file() and (value := read_json(hf_dir / file).get(key)) is not None:
            return value
    tokenizer = load_tokenizer(hf_dir)
    return getattr(tokenizer, key) if tokenizer is not None else None


def free_id(tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int) -> int | None:
    """The lowest id that no token has, if the vocabulary has one."""
    used = set(tokenizer.get_vocab().values()) if tokenizer is not None else set()
    return next((i for i in range(vocab_size) if i not in used), None)


def _no_room(
    hf_dir: Path,
    mask: object,
    vocab_size: int,
    tokenizer: "PreTrainedTokenizerBase | None",
    chosen: bool,
) -> str:
    free = free_id(tokenizer, vocab_size) if tokenizer is not None else vocab_size - 1
    remedy = (
        f"give an unused id, e.g. model.mask_token_id={free} (import_hf: --mask-token-id {free})"
        if free is not None
        else "every id is a token: import the model with --mask-token TEXT, a token that no text "
        "uses, or with --add-mask-token, one more row"
    )
    what = "mask_token_id" if chosen else "the usual mask token"
    return f"{hf_dir}: no room for {what} {mask!r} in vocab_size={vocab_size}; {remedy}"


def _refuse_ordinary_token(
    hf_dir: Path, mask: int, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> None:
    """An id whose token is a mask token by its text is fine: some tokenizers add it without
    registering it.
    """
    token = {index: text for text, index in tokenizer.get_vocab().items()}.get(mask)
    if token is None or token in MASK_TEXTS:
        return
    free = free_id(tokenizer, vocab_size)
    remedy = f"use an unused id such as {free}" if free is not None else "no id is unused"
    raise InputError(f"{hf_dir}: mask_token_id={mask} is the ordinary token {token!r}; {remedy}")
