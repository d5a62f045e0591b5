"""Gives a tokenizer its mask token at exactly the id that the model was trained with.

Tokenizer files are edited as JSON, so that they stay readable by the transformers version that
wrote them. The result is loaded again and compared: the mask token has its id, and no other token
has moved.
"""

import json
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.shape import read_json
from megatron_opdlm.model_files.vocabulary import MASK_TEXTS, load_tokenizer


def register_mask(directory: Path, mask_id: int, named: str | None = None) -> None:
    """Register the mask token in every tokenizer file of ``directory``; nothing to do without a
    tokenizer. ``named`` is its text, where it has to have a certain one.

    Raises InputError when the tokenizer cannot hold it.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        return
    before = tokenizer.get_vocab()
    text = str(tokenizer.mask_token)  # a registered one keeps its text, but not every file has it
    if named is not None:
        text = named
    elif tokenizer.mask_token_id != mask_id:
        text = _mask_text(before, mask_id, directory)
    if not (directory / "tokenizer.json").is_file():
        tokenizer.save_pretrained(directory)  # in the spelling of the installed transformers
        write_for_transformers_4(directory)
    entry = {
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    _edit(directory / "tokenizer.json", lambda content: _add_token(content, mask_id, entry, before))
    _edit(directory / "tokenizer_config.json", lambda content: _name_mask(content, mask_id, entry))
    _edit(directory / "special_tokens_map.json", lambda content: content.update(mask_token=text))
    _edit(directory / "added_tokens.json", lambda content: content.update({text: mask_id}))

    after = load_tokenizer(directory)
    assert after is not None
    if after.mask_token_id != mask_id or after.get_vocab() != {**before, text: mask_id}:
        raise RunError(
            f"{directory}: {text} came out at id {after.mask_token_id} instead of {mask_id}, or "
            "other tokens moved; register the mask token in the tokenizer before importing"
        )


def _mask_text(vocabulary: dict[str, int], mask_id: int, directory: Path) -> str:
    """The text that the id has already, else the first usual text that is free."""
    for text in MASK_TEXTS:
        if vocabulary.get(text, mask_id) == mask_id and (
            text in vocabulary or mask_id not in vocabulary.values()
        ):
            return text
    raise InputError(
        f"{directory}: mask_token_id={mask_id} cannot be named, since {', '.join(MASK_TEXTS)} or "
        "the id itself are other tokens; register the mask token in the tokenizer before importing"
    )


def _edit(path: Path, change: Any) -> None:
    if path.is_file():
        content = read_json(path)
        change(content)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _add_token(
    content: dict[str, Any], mask_id: int, entry: dict[str, Any], before: dict[str, int]
) -> None:
    """Add the token to tokenizer.json.

    Tokenizers number added tokens on: an id that leaves a gap holds only if every added token is
    also an entry of the model's own vocabulary, where ids are explicit.
    """
    added = content.setdefault("added_tokens", [])
    if entry["content"] in {token["content"] for token in added}:
        return
    if mask_id != max(before.values()) + 1 and entry["content"] not in before:
        vocabulary = content["model"].get("vocab")
        if not isinstance(vocabulary, dict):
            raise InputError(
                f"mask_token_id={mask_id} leaves a gap after the tokenizer's last id "
                f"{max(before.values())}; this kind of tokenizer needs {max(before.values()) + 1}"
            )
        vocabulary.update({token["content"]: token["id"] for token in added})
        vocabulary[entry["content"]] = mask_id
    added.append({"id": mask_id, **entry})
    added.sort(key=lambda token: token["id"])


def write_for_transformers_4(directory: Path) -> None:
    """Spell tokenizer_config.json so that transformers 4 reads it too, not only version 5, and
    leave out where it points to code, which an export does not carry.
    """

    def respell(content: dict[str, Any]) -> None:
        content.pop("auto_map", None)
        if content.get("tokenizer_class") == "TokenizersBackend":
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(content.get("extra_special_tokens"), list):
            content["additional_special_tokens"] = content.pop("extra_special_tokens")

    _edit(directory / "tokenizer_config.json", respell)


def _name_mask(content: dict[str, Any], mask_id: int, entry: dict[str, Any]) -> None:
    content["mask_token"] = entry["content"]
    if "added_tokens_decoder" in content:
        content["added_tokens_decoder"][str(mask_id)] = entry
