"""Claims about ``export_hf --quantize fp8``: scales are amax / 448 of what the student computes in
its masked states; every weight on disk is within half a step of E4M3; the KL that is reported is
that of the exported model's own code on other rollouts; nothing is left of an export that loses too
much.

Hugging Face's Qwen3 with hooks is the independent side: it knows neither ModelOpt nor Megatron.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from checkpoint_tools import export_hf, import_hf, inspect, serve_check, verify
from checkpoint_tools.engines.demands import read_directory
from checkpoint_tools.export.formats import code_of
from evaluation import sample
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.families import LAYOUTS, HFLayout
from tests.tiny_models import make_model, make_qwen3

MASK_ID, BLOCK, END_IDS = 64, 4, (48, 46)
PROMPTS = [[(11 * i + 3 * length) % 46 for i in range(length)] for length in range(1, 13)]
HELD_OUT = 3  # a quarter of the rollouts


@dataclass(frozen=True)
class Quantized:
    source: Path
    checkpoint: Path
    rollouts: Path
    sdar: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.rollouts.read_text().splitlines()]


def run(patch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    patch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


def flags(made: Quantized, out: Path, name: str = "sdar") -> list[object]:
    common = ["--checkpoint", made.checkpoint, "--out", out, "--format", name]
    return [*common, "--quantize", "fp8", "--calibration", made.rollouts]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    root = tmp_path_factory.mktemp("quantized")
    source = make_qwen3(root / "source", tied=True, seed=21, layers=2)
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))
    result = Quantized(source, root / "checkpoint", root / "rollouts.jsonl", root / "sdar")
    with pytest.MonkeyPatch.context() as patch:
        paths = ("--hf", source, "--out", result.checkpoint)
        run(patch, import_hf.main, *paths, "--mask-token-id", MASK_ID)
        paths = ("--model", result.checkpoint, "--prompts", prompts, "--out", result.rollouts)
        run(patch, sample.main, *paths, "--max-new-tokens", 9)
        run(patch, export_hf.main, *flags(result, result.sdar))
    return result


def test_inspect_knows_its_own_export(
    made: Quantized, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a complete FP8 export is said to be complete"""
    run(monkeypatch, inspect.main, made.sdar)
    said = capsys.readouterr().out
    assert "dtype: fp8 in 14 linears, fp32 elsewhere" in said
    assert "weight files: 1, " in said and said.endswith("complete: yes\n")


def states(row: dict[str, Any]) -> list[list[bool]]:
    """State j of every block together: what was committed in its j-th pass or later is masked."""
    prompt, passes = len(row["prompt_ids"]), row["committed_at"]
    block = [(prompt + i) // BLOCK for i in range(len(passes))]
    own = {b: sorted({p for p, c in zip(passes, block, strict=True) if c == b}) for b in block}
    most = max(map(len, own.values()))
    return [
        [j < len(own[b]) and p >= own[b][j] for p, b in zip(passes, block, strict=True)]
        for j in range(most)
    ]


def counted(row: dict[str, Any], masked: list[bool]) -> list[int]:
    """Masked positions through the first end token, in the sequence."""
    ends = [i for i, token in enumerate(row["response_ids"]) if token in END_IDS]
    last = ends[0] + 1 if ends else len(masked)
    return [len(row["prompt_ids"]) + i for i in range(last) if masked[i]]


def two_streams(model: Any, row: dict[str, Any], masked: list[bool]) -> Tensor:
    """Logits [positions, V] of the noisy copy, by one forward with both copies and a 4-D mask."""
    clean = torch.tensor([*row["prompt_ids"], *row["response_ids"]])
    hidden = torch.tensor([False] * len(row["prompt_ids"]) + masked)
    noisy = torch.where(hidden, MASK_ID, clean)
    position = torch.arange(len(clean)).repeat(2)
    block, is_clean = position // BLOCK, torch.arange(2 * len(clean)) < len(clean)
    q, k = block[:, None], block[None]
    qc, kc = is_clean[:, None], is_clean[None]
    visible = (kc & ((k < q) | (qc & (k == q)))) | (~qc & ~kc & (k == q))
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(
            input_ids=torch.cat([clean, noisy])[None],
            attention_mask=mask[None, None],
            position_ids=position[None],
            use_cache=False,
        ).logits[0, len(clean) :]


def largest_inputs(made: Quantized, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Module of Hugging Face's model -> largest absolute input in all states of these rollouts, at
    the tokens that training computes: the noisy copies of blocks with counted positions, and the
    clean tokens before the last of these.
    """
    model: Any = Qwen3ForCausalLM.from_pretrained(made.source, attn_implementation="eager")
    found: dict[str, float] = {}
    used = torch.ones(0)

    def watch(name: str) -> Any:
        def see(_: torch.nn.Module, x: tuple[Tensor]) -> None:
            found[name] = max(found.get(name, 0.0), float(x[0][0, used].abs().max()))

        return see

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(f"model.layers.{name}"))
    for row in rows:
        for masked in states(row):
            blocks = {at // BLOCK for at in counted(row, masked)}
            if not blocks:
                continue
            tokens = range(len(row["prompt_ids"]) + len(masked))
            clean = [i // BLOCK < max(blocks) for i in tokens]
            used = torch.tensor(clean + [i // BLOCK in blocks for i in tokens])
            two_streams(model, row, masked)
    return found


def test_scales_are_amax_over_448(made: Quantized) -> None:
    """Claim: of the joined weights, and of the inputs in the states of the calibration rollouts. In
    the last layer what follows attention is computed only where it is read, so it may be below the
    whole row's.
    """
    source, stored = (load_file(d / "model.safetensors") for d in (made.source, made.sdar))
    inputs = largest_inputs(made, made.rows[:-HELD_OUT])
    joined = (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj"))
    for layer in range(2):
        for part, *names in (*joined, ("self_attn", "o_proj"), ("mlp", "down_proj")):
            modules = [f"model.layers.{layer}.{part}.{name}" for name in names]
            amax = max(float(source[f"{module}.weight"].abs().max()) for module in modules)
            for module in modules:
                weight, entered = (stored[f"{module}.{of}_scale"] for of in ("weight", "input"))
                assert weight.shape == entered.shape == () and weight.dtype is torch.float32
                assert float(weight) == pytest.approx(amax / 448, rel=1e-6)
                if names[0] == "q_proj" or layer == 0:
                    assert float(entered) == pytest.approx(inputs[module] / 448, rel=1e-4)
                else:
                    assert 0 < float(entered) <= inputs[module] / 448 * (1 + 1e-4)


def test_weights_are_within_half_a_step(made: Quantized) -> None:
    """Claim: E4M3 has 3 bits after the point, and steps of 2^-9 below 2^-6; what is not quantised
    is bit-equal, the head written out.
    """
    source, stored = (load_file(d / "model.safetensors") for d in (made.source, made.sdar))
    assert torch.equal(stored["lm_head.weight"], source["model.embed_tokens.weight"])
    linears = 0
    for name, weight in source.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(stored[name], weight)
            continue
        assert stored[name].dtype is torch.float8_e4m3fn
        scale = stored[name.replace(".weight", ".weight_scale")]
        step = (2.0 ** (weight / scale).abs().log2().floor().clamp(min=-6)) / 8 * scale
        error = (stored[name].float() * scale - weight).abs()
        assert bool((error <= step / 2 * (1 + 1e-5)).all())
        linears += 1
    assert linears == 14
    assert len(stored) == len(source) + 1 + 2 * linears


def test_reported_kl_is_that_of_the_exported_code(made: Quantized) -> None:
    """Claim: the exported model, loaded by transformers, and Hugging Face's unquantised one differ
    by what quantization.json says, at the masked positions of the held-out rollouts.
    """
    record = assert_reported_kl(made.source, made.sdar, made.rows)
    assert 0.001 < record["kl_mean"] < 0.2  # FP8 of random weights, not another model
    card = (made.sdar / "README.md").read_text()
    assert f"| {record['kl_mean']:.4g} | {record['kl_max']:.4g} |" in card


def assert_reported_kl(source: Path, export: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    plain: Any = AutoModelForCausalLM.from_pretrained(source)
    kl, changed = [], []
    for row in rows[-HELD_OUT:]:
        for masked in states(row):
            at = counted(row, masked)
            p, q = (two_streams(m, row, masked)[at].double() for m in (plain, loaded))
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            changed.append(p[:, :49].argmax(-1) != q[:, :49].argmax(-1))  # ids of the tokenizer
    values, changes = torch.cat(kl), torch.cat(changed)
    record = json.loads((export / "quantization.json").read_text())
    assert record["calibration_samples"] == len(PROMPTS) - HELD_OUT
    assert (record["held_out_samples"], record["positions"]) == (HELD_OUT, len(values))
    assert len(values) > 20
    # An input on the edge of two FP8 numbers may be rounded the other way (test_fp8_teacher).
    assert record["kl_mean"] == pytest.approx(float(values.mean()), rel=0.05)
    assert record["kl_max"] == pytest.approx(float(values.max()), rel=0.1)
    assert abs(record["argmax_changes"] - float(changes.double().mean())) <= 1.5 / len(values)
    return record


def test_biases_are_kept(made: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the same of a Qwen2, whose quantised linears have biases, bit-equal on disk."""
    source = make_model(tmp_path / "source", "qwen2", tied=False, seed=21, layers=1)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    paths = ("--hf", source, "--out", checkpoint, "--mask-token-id", MASK_ID)
    run(monkeypatch, import_hf.main, *paths)
    qwen2 = Quantized(source, checkpoint, made.rollouts, out)
    run(monkeypatch, export_hf.main, *flags(qwen2, out, "a2d-qwen2"))
    assert_reported_kl(source, out, made.rows)
    before, after = (load_file(d / "model.safetensors") for d in (source, out))
    biases = [name for name in before if name.endswith("bias")]
    assert len(biases) == 3 and all(torch.equal(before[name], after[name]) for name in biases)


def test_generate_and_engines_read_it(made: Quantized) -> None:
    """Claim: transformers decodes blocks with it; serve_check names LMDeploy as the engine that
    does not know it; verify holds it against the checkpoint; our own loader says what it wants.
    """
    found = list(serve_check.check(read_directory(made.sdar), checkpoint=made.checkpoint))
    broken = {(f.engine, f.check) for f in found if f.problem}
    constants = {(engine, "mask constant") for engine in ("SGLang", "LMDeploy")}  # of a toy
    assert broken == {("LMDeploy", "quantisation"), *constants}
    assert {"loading", "parity"} <= {f.check for f in found}
    config = json.loads((made.sdar / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "FP8")
    assert config["ignore"] == ["lm_head"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="are quantised"):
        out = ("--prompts", made.rollouts, "--out", made.sdar.with_name("again.jsonl"))
        run(patch, sample.main, "--model", made.sdar, *out)


def test_verify_finds_one_wrong_number(made: Quantized, tmp_path: Path) -> None:
    directory = tmp_path / "spoiled"
    directory.mkdir()
    for file in made.sdar.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name].view(torch.uint8)[3, 5] ^= 1
    save_file(weights, directory / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=name):
        run(patch, verify.main, "--hf", directory, "--checkpoint", made.checkpoint)
    del weights[name.replace(".weight", ".input_scale")]
    save_file(weights, directory / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="input_scale"):
        run(patch, verify.main, "--hf", directory, "--checkpoint", made.checkpoint)


def test_sharded_bf16_of_another_format(
    made: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: shards with an index, tied, bf16 beside FP8: it loads and decodes the same in bf16."""
    out = tmp_path / "a2d"
    run(
        monkeypatch,
        export_hf.main,
        *flags(made, out, "a2d-qwen3"),
        *("--dtype", "bf16", "--shard-bytes", 30000, "--calibration-samples", 5),
    )
    assert len(list(out.glob("*.safetensors"))) > 2
    assert json.loads((out / "quantization.json").read_text())["calibration_samples"] == 5
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.dtype is torch.bfloat16
    assert model.model.layers[1].mlp.up_proj.weight.dtype is torch.float8_e4m3fn
    made_ids = model.generate(torch.tensor([PROMPTS[5]]), max_new_tokens=4)
    assert made_ids.shape[1] > 6 and MASK_ID not in made_ids


def test_nothing_is_left_of_what_loses_too_much(
    made: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="--max-kl 0 allows less"):
        run(monkeypatch, export_hf.main, *flags(made, tmp_path / "out"), "--max-kl", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--quantize", "nvfp4"], "nvfp4 is not built"),
        (["--quantize", "int8"], "int8 is not built"),
        (["--quantize", "fp8"], "give --calibration samples.jsonl"),
        (["--max-kl", "1"], "add --quantize fp8"),
        (["--quantize", "fp8", "--max-kl", "-1"], "is no divergence"),
        (["--quantize", "fp8", "--max-kl", "nan"], "must be a finite number"),
        (["--quantize", "fp8", "--calibration-samples", "0"], "is not positive"),
    ],
)
def test_bad_flags(
    made: Quantized,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    reason: str,
) -> None:
    common = ("--checkpoint", made.checkpoint, "--out", tmp_path / "out", "--format", "sdar")
    with pytest.raises(InputError, match=reason):
        run(monkeypatch, export_hf.main, *common, *extra)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response_ids": None}, "line 2: response_ids is missing"),
        ({"response_ids": []}, "line 2: the prompt or the response is empty"),
        ({"response_ids": [67]}, "line 2: .*67"),
        ({"committed_at": [1]}, r"line 2: committed_at has 1 entries for \d+ response_ids"),
        ({"prompt_ids": [1] * 512}, "line 2: .* exceed the model's 512 positions"),
        ({"same": True}, "1 different rollout; give at least 2"),
    ],
)
def test_bad_rollouts(
    made: Quantized,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    reason: str,
) -> None:
    first, second = made.rows[4:6]
    rows = [first, first if "same" in change else second | change]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--checkpoint", made.checkpoint, "--out", tmp_path / "out", "--format", "sdar")
    with pytest.raises(InputError, match=reason):
        run(monkeypatch, export_hf.main, *common, "--quantize", "fp8", "--calibration", file)
    assert not (tmp_path / "out").exists()


def test_rollouts_without_passes_and_with_messages(
    made: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: prompts are rendered where ids are missing, and states masked at random where passes
    are.
    """
    rows = [
        {"messages": [{"role": "user", "content": f"{n}+{n}="}], "response_ids": [*range(n, n + 6)]}
        for n in range(1, 7)
    ]
    file, out = tmp_path / "rollouts.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--checkpoint", made.checkpoint, "--out", out, "--format", "qwen3")
    run(monkeypatch, export_hf.main, *common, "--quantize", "fp8", "--calibration", file)
    record = json.loads((out / "quantization.json").read_text())
    assert (record["calibration_samples"], record["held_out_samples"]) == (5, 1)
    problems = [f for f in serve_check.check(read_directory(out)) if f.problem]
    assert ("transformers", "quantisation") in [(f.engine, f.check) for f in problems]


@pytest.mark.parametrize(
    "layout", [one for one in LAYOUTS.values() if one.has_code], ids=lambda one: one.model_type
)
def test_modelling_files_name_every_file_beside_them(layout: HFLayout) -> None:
    """Claim: transformers 4 finds the whole code of an export: of a local directory it copies what
    the modelling and the configuration file import, and nothing that those files import in turn.
    """
    texts = [file.read_text() for file in code_of(layout)[:2]]
    named = {name for text in texts for name in re.findall(r"^from \.(\w+) import", text, re.M)}
    assert named >= {file.stem for file in code_of(layout)[2:]}


def test_experts_and_ranks_are_refused(
    tmp_path: Path, made: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_qwen3(tmp_path / "source", tied=False, seed=3, layers=1, experts=4)
    paths = ("--hf", source, "--out", tmp_path / "checkpoint")
    run(monkeypatch, import_hf.main, *paths, "--mask-token-id", MASK_ID)
    common = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out")
    asked = ("--format", "sdar", "--quantize", "fp8", "--calibration", made.rollouts)
    with pytest.raises(InputError, match="a mixture of experts is not quantised"):
        run(monkeypatch, export_hf.main, *common, *asked)
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="without torchrun"):
        run(monkeypatch, export_hf.main, *flags(made, tmp_path / "out"))
