"""Tiny random model directories of every family as Hugging Face would save them, with a real fast
tokenizer.

Every size differs from every other (heads x head_dim != hidden, ffn != hidden, groups != heads),
norms are random and the weights are large enough for decisive logits, so that a swapped axis or a
dropped norm changes the numbers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ALPHABET = (
    "?0123456789+=;:,.- \nabcdefghijklmnopqrstuvwxyz"  # one token per character; "?" is unknown
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
)  # the next ids, in this order, as in Qwen3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}--\n{% endif %}{% endif %}"
)


def make_tokenizer(
    alphabet: str = ALPHABET, *, mask_token: str | None = None
) -> PreTrainedTokenizerFast:
    """Character tokenizer: the alphabet, then ``SPECIAL``, then the mask token if named."""
    words = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.WordLevel(words, unk_token=alphabet[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=alphabet[0],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    ids = [tokenizer.convert_tokens_to_ids(name) for name in SPECIAL]
    assert ids == list(range(len(alphabet), len(alphabet) + len(SPECIAL)))
    if mask_token is not None:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_qwen3(directory: Path, **options: Any) -> Path:
    """A random Qwen3, or with ``experts`` a Qwen3-MoE; options of ``make_model``."""
    model_type = "qwen3_moe" if options.get("experts") else "qwen3"
    return make_model(directory, model_type, **options)


def make_model(
    directory: Path,
    model_type: str,
    *,
    tied: bool,
    seed: int,
    vocab: int = 67,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    groups: int = 2,
    head_dim: int | None = 32,  # None: config.json leaves it out
    ffn: int = 96,
    experts: int = 0,
    experts_per_token: int = 2,
    expert_ffn: int = 40,
    renormalize: bool = True,
    shards: int = 1,
    eos: Sequence[int] | None = None,
    mask_token: str | None = None,
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> Path:
    """Write a random model into ``directory`` and return it. ``keys``: more of config.json.

    ``eos`` None means <|im_end|> and <|endoftext|>, as Qwen3 has it. The model has ``vocab`` rows;
    ids above the tokenizer's are free, so without ``mask_token`` the mask is a configured id such
    as ``vocab - 3``. ``shards`` is at least how many safetensors files the weights are split into.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(ALPHABET[: vocab - 6], mask_token=mask_token)
    end = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    options: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 512,
        "rope_theta": 50000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": end[0],
        "pad_token_id": end[1],
    }
    if head_dim is not None:
        options["head_dim"] = head_dim
    if experts:
        options |= {
            "num_experts": experts,
            "num_experts_per_tok": experts_per_token,
            "moe_intermediate_size": expert_ffn,
            "norm_topk_prob": renormalize,
        }
    config = AutoConfig.for_model(model_type, **{**options, **keys})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model = model.to(dtype)
    model.generation_config.eos_token_id = list(eos) if eos is not None else end
    model.generation_config.pad_token_id = end[1]
    total_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = total_bytes + 1 if shards == 1 else total_bytes // shards
    model.save_pretrained(directory, max_shard_size=limit)
    tokenizer.save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) >= shards
    return directory


@torch.no_grad()
def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file in place; None removes the key. For tests of bad directories."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content, indent=2))
