"""What SGLang, LMDeploy and transformers demand of a block-diffusion directory, as checks on files.

The engines' demands were read in their sources (August 2026): SGLang's ``dllm/config.py`` and
``models/sdar.py``, LMDeploy's ``configurations/sdar.py`` and ``strategies/dllm``. Nothing is
started and no code of the directory runs here; ``load.py`` loads it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.engines.code_demands import code_of_others, named_classes, needed_packages
from checkpoint_tools.engines.quantized_demands import QUANTIZED_READERS, quantized_weights
from checkpoint_tools.export import engine_settings as engine_settings
from checkpoint_tools.quantization.export import is_quantized
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import LAYOUTS
from megatron_opdlm.model_files.huggingface_files import read_contract
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_json, read_shape
from megatron_opdlm.model_files.vocabulary import load_tokenizer

SGLANG, LMDEPLOY, TRANSFORMERS = "SGLang", "LMDeploy", "transformers"
ENGINES = (SGLANG, LMDEPLOY)  # that serve; transformers loads
READERS = "people"  # who choose a model by its card
ENGINE_MASK_ID = 151669  # fixed in the code of both
SERVED = {layout.architecture: layout.model_type for layout in LAYOUTS.values() if layout.served}
EXPORT_AGAIN = "export with checkpoint_tools.export_hf --format sdar"
_TURN_END, _TEXT_END = "<|im_end|>", "<|endoftext|>"  # of Qwen's tokenizers
UNQUANTIZED = "serve it with SGLang, or export without --quantize"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check of one engine."""

    engine: str
    check: str
    problem: str = ""  # empty: ok
    remedy: str = ""
    note: str = ""  # beside an ok

    def __str__(self) -> str:
        state = f"breaks: {self.problem}" if self.problem else "ok"
        if self.note and not self.problem:
            state += f" ({self.note})"
        return f"{self.engine} | {self.check} | {state} | {self.remedy if self.problem else '-'}"


@dataclass(frozen=True, kw_only=True)
class Directory:
    """The files that the checks look at."""

    path: Path
    config: dict[str, Any]

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else names or "none"
        return str(first)

    @property
    def is_served(self) -> bool:
        return self.architecture in SERVED


def read_directory(path: Path) -> Directory:
    """Raises InputError for what is no model directory at all."""
    if not path.is_dir():
        raise InputError(f"--hf {path} is not a directory; give an exported model directory")
    return Directory(path=path, config=read_json(path / "config.json"))


def demands(directory: Directory) -> Iterator[Finding]:
    """Every check on files; engines that cannot load the layout at all get that one finding."""
    yield from _layout(directory)
    served = ENGINES if directory.is_served else ()
    everyone = (*served, TRANSFORMERS)
    yield from _code(directory)
    for engines, name, check, remedy in (
        (served, "lm_head", _head, EXPORT_AGAIN),
        (everyone, "rope_theta", _rope, EXPORT_AGAIN),
        (served, "attributes", _attributes, EXPORT_AGAIN),
        (everyone, "mask token", _mask, EXPORT_AGAIN),
        (served, "mask constant", _mask_constant, "train with the mask token at 151669"),
        (everyone, "end tokens", _end_tokens, "list all of them in generation_config.json"),
        (everyone, "weights", _weights, EXPORT_AGAIN),
        (served, "weight type", _weight_type, ""),
        (everyone, "chat template", _chat_template, "add the base model's chat_template.jinja"),
        (everyone, "block contract", _contract, "decode it with evaluation.sample"),
        ((SGLANG,) if served else (), engine_settings.SGLANG, _sglang, EXPORT_AGAIN),
        ((LMDEPLOY,) if served else (), engine_settings.LMDEPLOY, _lmdeploy, EXPORT_AGAIN),
        ((READERS,), "model card", _card, EXPORT_AGAIN),
    ):
        if engines:
            yield from _of_all(engines, name, remedy, *_result(check, directory))
    if is_quantized(directory.path):
        yield from _quantization(directory, everyone)


def _result(check: Any, directory: Directory) -> tuple[str, str]:
    """(problem, note) of a check; what the shared readers refuse is a problem, too."""
    try:
        found = check(directory)
    except InputError as error:
        return str(error), ""
    return found if isinstance(found, tuple) else (found, "")


def _of_all(
    engines: Sequence[str], check: str, remedy: str, problem: str, note: str = ""
) -> Iterator[Finding]:
    for engine in engines:
        yield Finding(engine=engine, check=check, problem=problem, remedy=remedy, note=note)


def _layout(directory: Directory) -> Iterator[Finding]:
    """Which engines know the architecture and the model type."""
    name, kind = directory.architecture, directory.config.get("model_type")
    plain = name in {layout.architecture for layout in LAYOUTS.values() if not layout.has_code}
    ar = f"{name} is decoded autoregressively, which a block-diffusion model is not" * plain
    unknown = ar or f"'Unknown diffusion LLM: {name}'"
    problem = "" if directory.is_served else unknown
    yield from _of_all((SGLANG,), "architecture", EXPORT_AGAIN, problem)
    if not directory.is_served:
        problem = ar or f"model_type={kind!r} is none of {', '.join(SERVED.values())}"
    elif kind != SERVED[name]:
        problem = f"model_type={kind!r} does not belong to {name} ({SERVED[name]!r})"
    yield from _of_all((LMDEPLOY,), "model type", EXPORT_AGAIN, problem)
    known = LAYOUTS.get(str(kind))
    if known is None or known.architecture != name:
        problem = f"model_type={kind!r} and {name} are no layout that this project writes"
    else:
        problem = ar
    yield from _of_all((TRANSFORMERS,), "architecture", EXPORT_AGAIN, problem)


def _code(directory: Directory) -> Iterator[Finding]:
    """The classes of ``auto_map`` exist, and their files import nothing that is not there."""
    layout = LAYOUTS.get(str(directory.config.get("model_type")))
    if layout is not None and not layout.has_code:
        return
    engines = (*ENGINES, TRANSFORMERS) if directory.is_served else (TRANSFORMERS,)
    for readers, name, check in (
        (engines, "auto_map", named_classes),
        (engines, "imports", needed_packages),
        ((TRANSFORMERS,), "code", code_of_others),
    ):
        found = _result(lambda d, check=check: check(d.path, d.config), directory)
        yield from _of_all(readers, name, EXPORT_AGAIN, *found)


def _head(directory: Directory) -> str:
    """SGLang indexes ``lm_head.weight`` of a tied model, which then has none (KeyError)."""
    if directory.config.get("tie_word_embeddings", True) is not False:
        return "tie_word_embeddings is not false: loading ends in KeyError 'lm_head.weight'"
    return ""


def _rope(directory: Directory) -> str:
    flat, record = directory.config.get("rope_theta"), directory.config.get("rope_parameters") or {}
    if not isinstance(record, dict):
        return f"rope_parameters={record!r} is no JSON object"
    nested = record.get("rope_theta", flat)
    if flat is None:
        return "no flat rope_theta: engines and transformers 4 take 10000"
    return "" if flat == nested else f"rope_theta={flat}, but rope_parameters says {nested}"


def _attributes(directory: Directory) -> str:
    config = directory.config
    needed = ["head_dim", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads"]
    if config.get("model_type") == "sdar_moe":
        needed += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
    missing = [key for key in needed if config.get(key) is None]
    missing += [key for key in ("attention_bias", "sliding_window") if key not in config]
    if missing:
        return f"config.json lacks {', '.join(missing)}"
    if config["attention_bias"] is not False or config["sliding_window"] is not None:
        return "attention_bias must be false and sliding_window null"
    return ""


def _mask(directory: Directory) -> str:
    """The id is the same in config.json and in every tokenizer file."""
    mask, tokenizer = directory.config.get("mask_token_id"), load_tokenizer(directory.path)
    if mask is None:
        return "config.json has no mask_token_id"
    if tokenizer is None:
        return "no tokenizer"
    typeless: Any = tokenizer
    text, found = typeless.mask_token, typeless.mask_token_id
    if found != mask:
        return f"mask_token_id={mask}, but the tokenizer's mask token {text!r} has id {found}"
    for name in ("special_tokens_map.json", "added_tokens.json"):
        path = directory.path / name
        if path.is_file() and text not in json.dumps(read_json(path), ensure_ascii=False):
            return f"{name} lacks the mask token {text!r}"
    return ""


def _mask_constant(directory: Directory) -> str:
    mask = directory.config.get("mask_token_id")
    return "" if mask == ENGINE_MASK_ID else f"mask id {mask}; the engine masks {ENGINE_MASK_ID}"


def _end_tokens(directory: Directory) -> tuple[str, str]:
    """(problem, note): what ends a text and what the tokenizer calls its end are listed.

    A base model's end is ``<|endoftext|>`` alone. It was not trained to close a turn of a chat, so
    ``<|im_end|>`` is no end of its unless it says so.
    """
    path, tokenizer = directory.path / "generation_config.json", load_tokenizer(directory.path)
    if not path.is_file():
        return "no generation_config.json", ""
    found = read_json(path).get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if tokenizer is None:
        return "" if listed else "generation_config.json names no end token", ""
    vocabulary = tokenizer.get_vocab()
    wanted = dict.fromkeys((_TURN_END, _TEXT_END, tokenizer.eos_token))
    lost = {
        str(text): f"{text} ({vocabulary[text]})"
        for text in wanted
        if text in vocabulary and vocabulary[text] not in listed
    }
    turn = lost.pop(_TURN_END, "") if tokenizer.eos_token != _TURN_END else ""
    if lost or not listed:
        return f"eos_token_id={found} lacks {', '.join(lost.values()) or 'any end token'}", ""
    return "", f"a base model's: {turn} does not end a response" if turn else ""


def _weights(directory: Directory) -> tuple[str, str]:
    """No tensor is missing, unexpected or of another shape; no file is cut short."""
    if is_quantized(directory.path):
        return quantized_weights(directory.path)
    with open_weights(directory.path, read_shape(directory.path)) as weights:
        return "", f"{len(weights.names())} tensors"


def _quantization(directory: Directory, engines: Sequence[str]) -> Iterator[Finding]:
    """Whether an engine reads ModelOpt's FP8 checkpoints."""
    for engine in engines:
        found = _result(
            lambda d, engine=engine: QUANTIZED_READERS[engine](d.path, d.config), directory
        )
        remedy = EXPORT_AGAIN if engine == SGLANG else UNQUANTIZED
        yield from _of_all((engine,), "quantisation", remedy, *found)


def _weight_type(directory: Directory) -> tuple[str, str]:
    kind = directory.config.get("torch_dtype", directory.config.get("dtype"))
    return "", "served as float16; export with --dtype bf16" if kind == "float32" else str(kind)


def _chat_template(directory: Directory) -> tuple[str, str]:
    tokenizer: Any = load_tokenizer(directory.path)
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "no chat template: chat requests fail", ""
    switch = "with" if "enable_thinking" in str(template) else "without"
    return "", f"{switch} thinking switch"


def _contract(directory: Directory) -> tuple[str, str]:
    """Engines decode unshifted logits in blocks counted from position 0."""
    contract = read_contract(directory.config, None)
    if contract.logit_shift:
        return "logit_shift=true: decoders read the logits at the position", ""
    if contract.block_alignment != "absolute":
        return f"block_alignment={contract.block_alignment}: blocks count from position 0", ""
    written = "block_alignment" in directory.config
    return "", "" if written else "not recorded, taken as SDAR's"


def _sglang(directory: Directory) -> str:
    settings = engine_settings.read_sglang(directory.path)
    size: Any = settings.get("block_size")
    threshold: Any = settings.get("threshold")
    if size != directory.config.get("block_size"):
        return f"block_size {size}, but the model has {directory.config.get('block_size')}"
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
        return f"threshold {threshold} is no probability"
    return ""


def _lmdeploy(directory: Directory) -> str:
    flags = engine_settings.read_lmdeploy(directory.path)
    size = flags.get("--dllm-block-length")
    if size != str(directory.config.get("block_size")):
        return f"block length {size}, but the model has {directory.config.get('block_size')}"
    strategy = flags.get("--dllm-unmasking-strategy")
    if strategy not in engine_settings.STRATEGIES:
        return f"unmasking strategy {strategy}, which it does not know"
    return "" if flags.get("--backend") == "pytorch" else "only its PyTorch engine decodes blocks"


def _card(directory: Directory) -> str:
    return "" if (directory.path / "README.md").is_file() else "no README.md"
