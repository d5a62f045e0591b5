"""Claims: an sdar export passes every check; each item of the checklist, broken once, is named with
the engine that it breaks and a remedy; code that this version did not write is not run."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import export_hf, import_hf, serve_check
from checkpoint_tools.engines.demands import read_directory
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.model_files.vocabulary import QWEN_MASK_ID, known_mask_token
from tests.tiny_models import edit_json, make_qwen3

ALL = ("SGLang", "LMDeploy", "transformers")
SERVING = ALL[:2]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with Qwen3's vocabulary, so that the engines' mask token is its own; bf16, tied."""
    root = tmp_path_factory.mktemp("served")
    sizes = {"hidden": 16, "heads": 2, "groups": 1, "head_dim": 8, "ffn": 24, "layers": 1}
    source = make_qwen3(
        root / "source", tied=True, seed=3, vocab=151936, dtype=torch.bfloat16, **sizes
    )
    mask = known_mask_token(source)
    assert mask == QWEN_MASK_ID
    with open_weights(source) as weights:
        contract = import_hf.read_contract({"block_size": 4}, mask)
        import_hf.convert(weights, root / "checkpoint", contract, "bf16")
    made = {"checkpoint": root / "checkpoint"}
    for name in ("sdar", "a2d-qwen3", "qwen3"):
        made[name] = root / name
        export_hf.convert(
            root / "checkpoint",
            root / name,
            read_manifest(root / "checkpoint"),
            read_shape(source),
            model_format=name,
            dtype="bf16",
        )
    return made


def copied(directory: Path, target: Path) -> Path:
    """A copy whose weights are the same files: cases replace them, never write into them."""

    def copy(source: str, to: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy)(source, to)

    return Path(shutil.copytree(directory, target, copy_function=copy))


def problems(directory: Path) -> list[tuple[str, str, str]]:
    """(engine, check, problem) of what breaks, without loading the model."""
    findings = serve_check.check(read_directory(directory), load=False)
    assert all(f.remedy for f in findings if f.problem)
    findings = serve_check.check(read_directory(directory), load=False)
    return [(f.engine, f.check, f.problem) for f in findings if f.problem]


def test_a_sound_export_passes_and_really_loads(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_check", "--hf", str(exports["sdar"])])
    serve_check.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "engine | check | state | remedy"
    assert all(line.count(" | ") == 3 for line in said)
    assert not [line for line in said if "breaks" in line]
    assert said[-1] == "transformers | loading | ok (loaded, a block decoded) | -"


def test_parity_with_the_checkpoint(exports: dict[str, Path]) -> None:
    found = list(
        serve_check.check(
            read_directory(exports["sdar"]), load=False, checkpoint=exports["checkpoint"]
        )
    )
    assert (found[-1].check, found[-1].problem) == ("parity", "")
    assert "tokens: greedy, 4 prompts of 5 to 8 tokens, equal" in found[-1].note


def edit_config(**changes: object) -> Callable[[Path], None]:
    """Change keys of config.json; ``...`` removes one."""

    def spoil(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return spoil


def replace_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file(tensors, file)

    return spoil


def rename_mask(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    edit_json(file, mask_token="<|im_start|>")


def import_flash_attention(directory: Path) -> None:
    with (directory / "modeling_sdar.py").open("a") as file:
        file.write("import flash_attn\n")


def forget_mask_in(name: str) -> Callable[[Path], None]:
    return lambda d: (d / name).write_text('{"<|im_end|>": 48}')


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda d: (d / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda d: (d / name).unlink()


CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str, str]] = {
    # 1. architectures, model_type, auto_map, files
    "architecture": (
        edit_config(architectures=["LLaMA"]),
        ("SGLang", "transformers"),
        "architecture",
        "Unknown diffusion LLM: LLaMA",
    ),
    "model type": (
        edit_config(model_type="sdar2"),
        ("LMDeploy",),
        "model type",
        "'sdar2' does not",
    ),
    "auto_map": (edit_config(auto_map={}), ALL, "auto_map", "auto_map has no AutoConfig"),
    "modelling file": (
        remove("modeling_sdar.py"),
        ALL,
        "auto_map",
        "modeling_sdar.py, which is missing",
    ),
    "decoding rules": (
        remove("denoising.py"),
        ALL,
        "imports",
        "block_diffusion.py imports denoising.py, which is missing",
    ),
    "flash-attn": (import_flash_attention, ALL, "imports", "needs the package flash_attn"),
    "foreign code": (
        write("randomness.py", "raise SystemExit('it ran')"),
        ("transformers",),
        "code",
        "was not run",
    ),
    # 2. untied
    "tied": (edit_config(tie_word_embeddings=True), SERVING, "lm_head", "KeyError"),
    "no lm_head": (
        replace_weights(lambda t: t.pop("lm_head.weight")),
        ALL,
        "weights",
        "lacks lm_head.weight",
    ),
    # 3. attributes
    "rope_theta": (
        edit_config(rope_theta=..., rope_parameters={"rope_theta": 5e4, "rope_type": "default"}),
        ALL,
        "rope_theta",
        "no flat rope_theta",
    ),
    "two rope_theta": (
        edit_config(rope_parameters={"rope_theta": 1.0}),
        ALL,
        "rope_theta",
        "rope_parameters says 1.0",
    ),
    "head_dim": (edit_config(head_dim=...), SERVING, "attributes", "lacks head_dim"),
    "sliding_window": (
        edit_config(sliding_window=4096),
        SERVING,
        "attributes",
        "sliding_window null",
    ),
    "attention_bias": (edit_config(attention_bias=...), SERVING, "attributes", "attention_bias"),
    # 4. mask token
    "mask of the tokenizer": (rename_mask, ALL, "mask token", "has id 47"),
    "mask of the config": (edit_config(mask_token_id=64), ALL, "mask token", "mask_token_id=64"),
    "mask of the engine": (
        edit_config(mask_token_id=64),
        SERVING,
        "mask constant",
        "mask id 64; the engine masks 151669",
    ),
    "mask in every file": (
        forget_mask_in("added_tokens.json"),
        ALL,
        "mask token",
        "added_tokens.json lacks",
    ),
    # 5. end tokens
    "end tokens": (
        lambda d: edit_json(d / "generation_config.json", eos_token_id=48),
        ALL,
        "end tokens",
        r"lacks <\|endoftext\|> \(46\)",
    ),
    "no generation config": (remove("generation_config.json"), ALL, "end tokens", "no generation"),
    # 6. tensors
    "extra tensor": (
        replace_weights(lambda t: t.update({"model.extra.weight": torch.zeros(2)})),
        ALL,
        "weights",
        "holds model.extra.weight",
    ),
    # 7. chat template
    "chat template": (remove("chat_template.jinja"), ALL, "chat template", "no chat template"),
    # 8. engine settings
    "no sglang.yaml": (remove("sglang.yaml"), ("SGLang",), "sglang.yaml", "blocks of 4 and"),
    "block size of SGLang": (
        write("sglang.yaml", "block_size: 32\nthreshold: 0.9\n"),
        ("SGLang",),
        "sglang.yaml",
        "block_size 32, but the model has 4",
    ),
    "threshold of SGLang": (
        write("sglang.yaml", "block_size: 4\nthreshold: 9\n"),
        ("SGLang",),
        "sglang.yaml",
        "no probability",
    ),
    "block size of LMDeploy": (
        write("lmdeploy.args", "--backend pytorch --dllm-block-length 8\n"),
        ("LMDeploy",),
        "lmdeploy.args",
        "block length 8, but the model has 4",
    ),
    # the names of SDAR, another contract (I-DLM)
    "logit shift": (edit_config(logit_shift=True), ALL, "block contract", "logit_shift=true"),
    "causal context": (edit_config(clean_context="causal"), ALL, "block contract", "'causal'"),
    "response blocks": (
        edit_config(block_alignment="response"),
        ALL,
        "block contract",
        "block_alignment='response'",
    ),
    # 11. model card
    "model card": (remove("README.md"), ("people",), "model card", r"no README\.md"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_item_broken_once(exports: dict[str, Path], tmp_path: Path, case: str) -> None:
    spoil, engines, check, reason = CASES[case]
    directory = copied(exports["sdar"], tmp_path / "model")
    assert problems(directory) == []
    spoil(directory)
    found = [(engine, problem) for engine, name, problem in problems(directory) if name == check]
    assert tuple(engine for engine, _ in found) == engines
    with pytest.raises(RunError, match=reason):
        raise RunError(found[0][1])


def test_foreign_code_is_not_run(exports: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(exports["sdar"], tmp_path / "model")
    with (directory / "configuration_sdar.py").open("a") as file:
        file.write("raise SystemExit('foreign code ran')\n")
    found = list(serve_check.check(read_directory(directory)))
    assert [f.check for f in found if f.problem] == ["code"]
    assert "loading" not in [f.check for f in found]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("a2d-qwen3", {"SGLang": "Unknown diffusion LLM: A2DQwen3LMHeadModel", "LMDeploy": "a2d"}),
        ("qwen3", dict.fromkeys(ALL, "Qwen3ForCausalLM is decoded autoregressively")),
    ],
)
def test_the_other_layouts_say_who_cannot_load_them(
    exports: dict[str, Path], name: str, broken: dict[str, str]
) -> None:
    found = problems(exports[name])
    assert [engine for engine, _, _ in found] == list(broken)
    assert all(broken[engine] in problem for engine, _, problem in found)


def test_exit_codes(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(directory: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["serve_check", "--hf", str(directory), "--no-load"])
        serve_check.main()

    run(exports["sdar"])
    with pytest.raises(RunError, match=r"3 of 10 checks break \(SGLang, LMDeploy, transformers\)"):
        run(exports["qwen3"])
    with pytest.raises(InputError, match="is not a directory"):
        run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        run(tmp_path)
