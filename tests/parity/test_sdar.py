"""Claims: exported sdar and a2d directories load where there is only torch and transformers,
and generate exactly the tokens of ``evaluation.sample`` at every residue of the prompt length,
static and dynamic, at the end of the model's positions, and in bf16; the MoE form likewise."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from checkpoint_tools import export_hf, import_hf
from checkpoint_tools.export.own_code import has_our_code
from evaluation import sample
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.model_files.shape import read_shape
from tests.tiny_models import edit_json, make_model, make_qwen3, make_tokenizer

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
    monkeypatch: pytest.MonkeyPatch, model: Path, root: Path, flags: list[str], limit: int = 9
) -> list[list[int]]:
    """Response ids of ``evaluation.sample`` for ``PROMPTS``."""
    prompts, out = root / "prompts.jsonl", root / f"{'_'.join(flags).strip('-')}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))
    arguments = ("--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", limit)
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
    others = [other_family(monkeypatch, tmp_path, name) for name in ("qwen2", "llama")]
    expected_of = [expected, expected]
    for other in others:
        folder = tmp_path / f"sampled-{other.name}"
        folder.mkdir()
        made = [sampled(monkeypatch, other, folder, flags) for flags, _ in DECODINGS]
        expected_of.append(made)
    task = {
        "directories": [str(path) for path in (exported.sdar, exported.a2d, *others)],
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
    assert [json.loads(line.removeprefix("TOKENS ")) for line in lines] == expected_of


def other_family(monkeypatch: pytest.MonkeyPatch, root: Path, model_type: str) -> Path:
    """A block-diffusion export of another family."""
    source = make_model(root / f"{model_type}-source", model_type, tied=True, seed=21, layers=1)
    checkpoint = root / f"{model_type}-checkpoint"
    given = ("--hf", source, "--out", checkpoint, "--mask-token-id", MASK_ID)
    run(monkeypatch, import_hf.main, *given)
    return export(monkeypatch, checkpoint, root / f"a2d-{model_type}-export", f"a2d-{model_type}")


def generated(model: Any, limit: int = 9, **rules: object) -> list[list[int]]:
    """Response ids of an exported model's ``generate`` for ``PROMPTS``."""
    rows = [torch.tensor([ids]) for ids in PROMPTS]
    made = [model.generate(ids, max_new_tokens=limit, **rules)[0] for ids in rows]
    return [ids[len(prompt) :].tolist() for ids, prompt in zip(made, PROMPTS, strict=True)]


def test_responses_end_with_the_models_positions(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: ``generate`` clips as ``evaluation.sample`` does; a prompt without room is refused."""
    short = Path(shutil.copytree(exported.sdar, tmp_path / "short"))
    edit_json(short / "config.json", max_position_embeddings=10)
    edit_json(short / "generation_config.json", eos_token_id=[47])  # hardly ever drawn
    expected = sampled(monkeypatch, short, tmp_path, ["--denoising-steps", "4"], limit=32)
    assert 10 in [len(a) + len(b) for a, b in zip(PROMPTS, expected, strict=True)]
    model: Any = AutoModelForCausalLM.from_pretrained(short, trust_remote_code=True)
    assert generated(model, 32, denoising_steps=4) == expected
    with pytest.raises(ValueError, match="has 10 tokens, but the model has 10 positions; shorten"):
        model.generate(torch.zeros((1, 10), dtype=torch.int64), max_new_tokens=1)


def test_a_bf16_export_gives_the_samplers_tokens_in_float32(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: as docs/serving.md and the model card say it."""
    run(
        monkeypatch,
        export_hf.main,
        *("--checkpoint", exported.checkpoint, "--out", tmp_path / "bf16"),
        *("--format", "sdar", "--dtype", "bf16"),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", trust_remote_code=True, dtype=torch.float32
    )
    flags, rules = DECODINGS[0]
    assert generated(model, **rules) == sampled(monkeypatch, tmp_path / "bf16", tmp_path, flags)
    assert "dtype=torch.float32" in (tmp_path / "bf16" / "README.md").read_text()


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


def make_moe(directory: Path, **sizes: object) -> Path:
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
        **sizes,
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
    source, checkpoint = make_moe(tmp_path / "source", head_dim=32), tmp_path / "checkpoint"
    arguments = ("--hf", source, "--out", checkpoint, "--mask-token-id", MASK_ID)
    run(monkeypatch, import_hf.main, *arguments)
    out = export(monkeypatch, checkpoint, tmp_path / "sdar", "sdar")
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sdar_moe", ["SDARMoeForCausalLM"])
    assert [config[key] for key in ("num_experts", "num_experts_per_tok")] == [4, 2]
    flags, rules = DECODINGS[2]
    expected = sampled(monkeypatch, out, tmp_path, flags)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert generated(model, **rules) == expected
    run(monkeypatch, import_hf.main, "--hf", out, "--out", tmp_path / "again")
    assert read_manifest(tmp_path / "again").block_contract.block_size == 4


def test_experts_without_head_dim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: transformers' Qwen3-MoE has no default head_dim but hidden_size / heads, and an export
    says it to readers that have another."""
    source, checkpoint = make_moe(tmp_path / "source"), tmp_path / "checkpoint"
    assert "head_dim" not in json.loads((source / "config.json").read_text())
    run(monkeypatch, import_hf.main, "--hf", source, "--out", checkpoint)
    out = export(monkeypatch, checkpoint, tmp_path / "out", "qwen3")
    assert json.loads((out / "config.json").read_text())["head_dim"] == 16
    ids = torch.arange(20)[None]
    expected = Qwen3MoeForCausalLM.from_pretrained(source)(ids).logits
    assert torch.equal(Qwen3MoeForCausalLM.from_pretrained(out)(ids).logits, expected)
    edit_json(source / "config.json", num_attention_heads=6)
    with pytest.raises(InputError, match="num_attention_heads=6 does not divide hidden_size=64"):
        read_shape(source)
