"""Every reader of users' files, with a good file of it and what a value of it must be."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from evaluation import jsonl
from evaluation.recipe import read_recipe
from evaluation.reporting.results import read_summary
from evaluation.score import read_predictions
from evaluation.tasks import get_task
from megatron_opdlm.config import Config, load_config
from megatron_opdlm.data import rows
from megatron_opdlm.model_files.manifest import FORMAT, Manifest, read_manifest
from megatron_opdlm.model_files.safetensors_dir import TensorEntry, read_header
from megatron_opdlm.model_files.shape import ModelShape, read_shape
from megatron_opdlm.prompts import load_prompts
from megatron_opdlm.replay import read_states

PROMPT = '{"prompt_ids": [1, 2], "response": "a", "domain": "math"}\n'
STATE = '{"prompt_ids": [1, 2], "response_ids": [3, 4], "masked": [1, 0]}\n'
PREDICTION = '{"index": 0, "responses": ["#2"], "finish_reason": ["stop"], "passes": [4]}\n'
ROW = {"task": "addition", "n": 1, "accuracy": 0.5, "stderr": None, "seconds": 1.0}
ROW |= {"tokens_per_denoising_step": 1.0, "tokens_per_forward": 1.0, "mean_response_tokens": 2.0}
ROW |= {"settings": {"mode": "ar", "model": "x"}}
MANIFEST = {"format": FORMAT, "kind": "model", "dtype": "fp32", "step": None, "files": {}}
MANIFEST |= {"block_contract": {"mask_token_id": 64, "block_size": 4}, "low_rank": None}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "rope_theta": 1e4}
MODEL = {"model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **SIZES}
RECIPE = "common: {max_new_tokens: 8}\nruns:\n- {name: a, tasks: [addition], samples: 2}\n"
HEADER = {"__metadata__": {}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def shard(header: object, data: int = 24) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


class Characters:
    """Stands for a tokenizer: one id a character."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [letter % 60 for letter in text.encode()]}


def prompts(path: Path) -> object:
    return load_prompts(
        path, Characters(), enable_thinking=False, max_prompt_tokens=9, vocab_size=60
    )


def of_directory(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: read(path.parent)


def is_rows(value: Any) -> bool:
    return bool(value) and all(isinstance(row, dict) for row in value)


def is_shape(value: Any) -> bool:
    return isinstance(value, ModelShape) and value.parameters > 0 and value.rope_theta > 0


def is_header(value: Any) -> bool:
    return all(isinstance(e, TensorEntry) and 8 <= e.start <= e.stop for e in value.values())


def is_states(value: Any) -> bool:
    return all(len(r["masked"]) == len(r["response_ids"]) and r["prompt_ids"] for r in value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader, a file that it takes, and what its value must be."""

    file: str
    read: Callable[[Path], Any]
    good: bytes
    is_valid: Callable[[Any], bool]


READERS = {
    "rows.jsonl": Reader(
        file="a.jsonl",
        read=lambda p: rows.read_rows(p, "data.path"),
        good=PROMPT.encode() * 2,
        is_valid=bool,
    ),
    "rows.json": Reader(
        file="a.json",
        read=lambda p: rows.read_rows(p, "data.path"),
        good=f"[{PROMPT},\n {PROMPT}]".encode(),
        is_valid=bool,
    ),
    "rows.parquet": Reader(
        file="a.parquet",
        read=lambda p: rows.read_rows(p, "data.path"),
        good=b"PAR1 nothing PAR1",
        is_valid=bool,
    ),
    "prompts": Reader(
        file="a.jsonl",
        read=prompts,
        good=PROMPT.encode() * 2,
        is_valid=lambda found: all(0 < len(p.ids) <= 9 for p in found.prompts),
    ),
    "trajectories": Reader(
        file="a.jsonl",
        read=lambda p: read_states(p, 60, 9),
        good=STATE.encode() * 2,
        is_valid=is_states,
    ),
    "evaluation rows": Reader(
        file="a.json",
        read=lambda p: jsonl.read_rows(p, "task x:"),
        good=f"[{PROMPT}, {PROMPT}]".encode(),
        is_valid=is_rows,
    ),
    "predictions": Reader(
        file="a.jsonl",
        read=lambda p: read_predictions(p, get_task("addition"), 3),
        good=PREDICTION.encode() + PREDICTION.replace("0", "1").encode(),
        is_valid=lambda found: all(0 <= row["index"] < 3 and row["responses"] for row in found),
    ),
    "summary": Reader(
        file="summary.json",
        read=read_summary,
        good=json.dumps([ROW, ROW]).encode(),
        is_valid=lambda found: isinstance(found, list),
    ),
    "safetensors": Reader(
        file="model.safetensors", read=read_header, good=shard(HEADER), is_valid=is_header
    ),
    "config.json": Reader(
        file="config.json",
        read=of_directory(read_shape),
        good=json.dumps(MODEL).encode(),
        is_valid=is_shape,
    ),
    "manifest": Reader(
        file="manifest.json",
        read=of_directory(read_manifest),
        good=json.dumps(MANIFEST).encode(),
        is_valid=lambda found: isinstance(found, Manifest),
    ),
    "configuration": Reader(
        file="run.yaml",
        read=lambda p: load_config(p, []),
        good=b"train: {steps: 3, out: runs/x}\noptimizer:\n  lr: 1e-3\n",
        is_valid=lambda found: isinstance(found, Config),
    ),
    "recipe": Reader(
        file="recipe.yaml",
        read=read_recipe,
        good=RECIPE.encode(),
        is_valid=lambda found: bool(found),
    ),
}


# A good file as a tree, and how it is written.
TREES: dict[str, tuple[Any, Callable[[Any], bytes]]] = {
    "rows.jsonl": (json.loads(PROMPT), lambda tree: json.dumps(tree).encode()),
    "prompts": (json.loads(PROMPT), lambda tree: json.dumps(tree).encode()),
    "trajectories": (json.loads(STATE), lambda tree: json.dumps(tree).encode()),
    "predictions": (json.loads(PREDICTION), lambda tree: json.dumps(tree).encode()),
    "summary": ([ROW], lambda tree: json.dumps(tree).encode()),
    "config.json": (MODEL, lambda tree: json.dumps(tree).encode()),
    "manifest": (MANIFEST, lambda tree: json.dumps(tree).encode()),
    "safetensors": (HEADER, shard),
    "configuration": (
        dataclasses.asdict(Config()),
        lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode(),
    ),
    "recipe": (yaml.safe_load(RECIPE), lambda tree: yaml.safe_dump(tree).encode()),
}
