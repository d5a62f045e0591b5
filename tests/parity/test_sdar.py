"""Claims: exported sdar and a2d-qwen3 directories load where there is only torch and transformers,
and generate exactly the tokens of ``evaluation.sample`` at every residue of the prompt length,
static and dynamic; the MoE form likewise; published directories import as they are; a contract that
cannot be honoured is refused."""

import importlib.metadata
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from checkpoint_tools import export_hf, import_hf
from checkpoint_tools.files.hf_files import has_our_code, read_contract
from checkpoint_tools.formats import LAYOUTS
from checkpoint_tools.manifest import read_manifest
from evaluation import sample
from megatron_opdlm.errors import InputError
from tests.tiny_models import edit_json, make_qwen3, make_tokenizer

MASK_ID = 64
# (flags of evaluation.sample, arguments of generate)
DECODINGS = (
    (["--denoising-steps", "4"], {"denoising_steps": 4}),
    (["--denoising-steps", "3"], {"denoising_steps": 3}),
    (
        ["--remasking", "low_confidence_dynamic", "--threshold", "0.3"],
        {"denoising_steps": 4, "threshold": 0.3},
    ),
)
PROMPTS = [[(11 * i + 3 * length) % 46 for i in range(length)] for length in range(1, 9)]
GENERATE = """
import importlib.util, json, sys
assert not any(map(importlib.util.find_spec, ("megatron", "checkpoint_tools", "accelerate")))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
task = json.load(sys.stdin)
for directory in task["directories"]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    assert tokenizer.mask_token_id == model.config.mask_token_id
    made = [
        [
            model.generate(torch.tensor([ids]), max_new_tokens=9, **rules)[0, len(ids):].tolist()
            for ids in task["prompts"]
        ]
        for rules in task["decodings"]
    ]
    print("TOKENS", json.dumps(made))
"""


@dataclass(frozen=True)
class Exported:
    source: Path
    checkpoint: Path
    sdar: Path
    a2d: Path


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


def export(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path, name: str) -> Path:
    run(monkeypatch, export_hf.main, "--checkpoint", checkpoint, "--out", out, "--format", name)
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("formats")
    source = make_qwen3(root / "source", tied=True, seed=21, layers=2)
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("--hf", source, "--out", root / "checkpoint", "--mask-token-id", MASK_ID)
        run(patch, import_hf.main, *arguments)
        sdar = export(patch, root / "checkpoint", root / "sdar", "sdar")
        a2d = export(patch, root / "checkpoint", root / "a2d", "a2d-qwen3")
    return Exported(source, root / "checkpoint", sdar, a2d)


def sampled(
    monkeypatch: pytest.MonkeyPatch, model: Path, root: Path, flags: list[str]
) -> list[list[int]]:
    """Response ids of ``evaluation.sample`` for ``PROMPTS``."""
    prompts, out = root / "prompts.jsonl", root / f"{'_'.join(flags).strip('-')}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))
    arguments = ("--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", 9)
    run(monkeypatch, sample.main, *arguments, *flags)
    return [json.loads(line)["response_ids"] for line in out.read_text().splitlines()]


def needed_by(*names: str) -> set[str]:
    """These distributions and all that they require, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def clean_environment(directory: Path) -> Path:
    """A virtual environment that holds torch, transformers and what they require, by links; returns
    its Python.
    """
    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    for name in needed_by("torch", "transformers"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return directory / "bin" / "python"


def test_clean_environment_generates_what_evaluation_samples(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [sampled(monkeypatch, exported.sdar, tmp_path, flags) for flags, _ in DECODINGS]
    assert expected[0] != expected[2]  # the rules differ, or the test says nothing
    task = {
        "directories": [str(exported.sdar), str(exported.a2d)],
        "prompts": PROMPTS,
        "decodings": [rules for _, rules in DECODINGS],
    }
    python = clean_environment(tmp_path / "clean")
    home = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-I", "-c", GENERATE],
        input=json.dumps(task),
        env=home,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert [json.loads(line.removeprefix("TOKENS ")) for line in lines] == [expected, expected]


def test_the_sdar_layout(exported: Exported) -> None:
    """Untied and flat, the mask named everywhere, the decoding rules the project's own files."""
    config = json.loads((exported.sdar / "config.json").read_text())
    assert config["architectures"] == ["SDARForCausalLM"]
    assert (config["tie_word_embeddings"], config["rope_theta"]) == (False, 50000.0)
    assert "rope_parameters" not in config
    assert config["sliding_window"] is None
    contract = ("block_size", "block_alignment", "logit_shift", "clean_context")
    assert [config[key] for key in contract] == [4, "absolute", False, "block_causal"]
    source, found = (load_file(d / "model.safetensors") for d in (exported.source, exported.sdar))
    assert torch.equal(found["lm_head.weight"], source["model.embed_tokens.weight"])
    assert set(found) == {*source, "lm_head.weight"}
    assert has_our_code(exported.sdar) and has_our_code(exported.a2d)
    generation = json.loads((exported.sdar / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [48, 46]
    model = AutoModelForCausalLM.from_pretrained(exported.sdar, trust_remote_code=True)
    assert model.config.rope_theta == 50000.0  # where engines look


def make_moe(directory: Path) -> Path:
    """A random Qwen3-MoE with published key names."""
    config = Qwen3MoeConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=50000.0,
        tie_word_embeddings=False,
        eos_token_id=48,
        pad_token_id=46,
    )
    generator = torch.Generator().manual_seed(5)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = name.endswith("norm.weight")
            parameter.copy_(1 + 0.3 * noise if norm else noise * 1.5 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = [48, 46]
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def test_the_form_with_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, checkpoint = make_moe(tmp_path / "source"), tmp_path / "checkpoint"
    arguments = ("--hf", source, "--out", checkpoint, "--mask-token-id", MASK_ID)
    run(monkeypatch, import_hf.main, *arguments)
    out = export(monkeypatch, checkpoint, tmp_path / "sdar", "sdar")
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sdar_moe", ["SDARMoeForCausalLM"])
    assert [config[key] for key in ("num_experts", "num_experts_per_tok")] == [4, 2]
    flags, rules = DECODINGS[2]
    expected = sampled(monkeypatch, out, tmp_path, flags)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = [
        model.generate(torch.tensor([ids]), max_new_tokens=9, **rules)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    assert found == expected
    run(monkeypatch, import_hf.main, "--hf", out, "--out", tmp_path / "again")
    assert read_manifest(tmp_path / "again").block_contract.block_size == 4


# Keys of the published configurations that a plain Qwen3 has not (sizes stay the tiny model's).
PUBLISHED = {
    "a2d": {
        "model_type": "a2d-qwen3",
        "architectures": ["A2DQwen3LMHeadModel"],
        "auto_map": {
            "AutoConfig": "modeling_qwen3.A2DQwen3Config",
            "AutoModel": "modeling_qwen3.A2DQwen3Model",
            "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
        },
        "dtype": "bfloat16",
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "rope_parameters": None,
    },
    "sdar": {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "attn_implementation": "flex_attention",
        "block_size": 4,
        "mask_token_id": 49,
        "debug": False,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "micro_forward": False,
        "skip_checkpoint": False,
        "use_deepep": False,
        "rope_scaling": None,
        "rope_theta": 50000,
        "rope_parameters": None,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    },
}


def published(directory: Path, kind: str, mask: str, *, registered: bool) -> Path:
    """A directory as it is published: its keys, its own code, its mask token."""
    make_qwen3(directory, tied=kind == "a2d", seed=8, layers=1)
    edit_json(directory / "config.json", **PUBLISHED[kind])
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(mask_token=mask if registered else None)
    if not registered:
        tokenizer.add_tokens([mask], special_tokens=True)
    tokenizer.save_pretrained(directory)
    code = ["tokenization_qwen2.Qwen2Tokenizer", None]
    edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": code})
    (directory / "modeling_sdar.py").write_text("raise SystemExit('foreign code ran')\n")
    return directory


@pytest.mark.parametrize(
    ("kind", "mask", "registered", "block_size"),
    [
        ("a2d", "<|mask|>", True, None),
        ("sdar", "<|MASK|>", True, 4),
        ("sdar", "<MASK>", False, 4),
    ],
)
def test_published_directories_import_as_they_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    mask: str,
    registered: bool,
    block_size: int | None,
) -> None:
    source = published(tmp_path / "source", kind, mask, registered=registered)
    run(monkeypatch, import_hf.main, "--hf", source, "--out", tmp_path / "checkpoint")
    contract = read_manifest(tmp_path / "checkpoint").block_contract
    assert (contract.mask_token_id, contract.block_size) == (49, block_size)
    out = export(monkeypatch, tmp_path / "checkpoint", tmp_path / "out", "sdar")
    config = json.loads((out / "config.json").read_text())
    assert "attn_implementation" not in config
    assert config["auto_map"] == LAYOUTS["sdar"].auto_map
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (mask, 49)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"clean_context": "causal", "logit_shift": True}, "clean_context='causal'"),  # I-DLM
        ({"block_alignment": "response"}, "block_alignment='response'"),
        ({"block_alignment": "middle", "model_type": "qwen3"}, "block_alignment='middle'"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": "4"}, "block_size='4'"),
        ({"logit_shift": 1}, "logit_shift=1"),
    ],
)
def test_a_contract_that_cannot_be_honoured(keys: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_contract({"model_type": "sdar", **keys}, 49)


def test_what_is_recorded_is_read() -> None:
    keys = {"model_type": "sdar", "block_size": 8, "logit_shift": True}
    contract = read_contract(keys, 49)
    assert (contract.block_size, contract.logit_shift) == (8, True)
    plain = read_contract({"model_type": "qwen3", "block_alignment": "response"}, 49)
    assert plain.block_alignment == "response"
