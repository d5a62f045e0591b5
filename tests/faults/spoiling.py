"""What befalls model directories: each function gives or is a change of a good one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import edit_json, make_tokenizer

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
Spoil = Callable[[Path], object]


def config(**changes: object) -> Spoil:
    return lambda d: edit_json(d / "config.json", **changes)


def generation(**changes: object) -> Spoil:
    return lambda d: edit_json(d / "generation_config.json", **changes)


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda d: (d / name).write_bytes(data)


def only(name: str, content: bytes) -> Spoil:
    """A directory with the configuration and one file of weights, of another kind."""

    def spoil(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(content)

    return spoil


def literal(key: str, value: str) -> Spoil:
    """Write a value into config.json that Python would not write."""

    def spoil(directory: Path) -> None:
        edit_json(directory / "config.json", **{key: "HERE"})
        file = directory / "config.json"
        file.write_text(file.read_text().replace('"HERE"', value))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        change(held)
        save_file(held, directory / "model.safetensors")

    return spoil


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the header of the weights and nothing else."""

    def spoil(directory: Path) -> None:
        file = directory / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
K, V = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")


def overlap(entries: dict[str, Any]) -> None:
    entries[V]["data_offsets"] = entries[K]["data_offsets"]


def gptq(held: dict[str, torch.Tensor]) -> None:
    held[Q.replace("weight", "qweight")] = torch.zeros(8, 128, dtype=torch.int32)
    held[Q.replace("weight", "scales")] = torch.zeros(1, 128)
    del held[Q]


def fp8(held: dict[str, torch.Tensor]) -> None:
    held[Q] = held[Q].to(torch.float8_e4m3fn)
    held[Q + "_scale_inv"] = torch.ones(1, 1)


def self_link(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(name)

    return spoil


def tokenizer_beyond(directory: Path) -> None:
    """The tokenizer of a larger model."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(directory)


def no_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(directory / "tokenizer_config.json", chat_template=None)


def template(text: str) -> Spoil:
    def spoil(directory: Path) -> None:
        no_template(directory)
        (directory / "chat_template.jinja").write_text(text)

    return spoil


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("*token*"):
        file.unlink()
