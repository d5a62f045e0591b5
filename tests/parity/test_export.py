"""Claims: import then export gives every tensor back bit for bit; the exported model loads with its
own code and decodes as a decoder without cache or batching does, at every prompt length modulo B;
its tokenizer has the mask token at the id that the model was trained with."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Qwen3ForCausalLM,
)

from checkpoint_tools import comparisons, export_hf, import_hf, verify
from checkpoint_tools.export.safetensors_writer import ShardWriter
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.manifest import BlockContract, read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.reporting.progress import Progress
from tests.tiny_models import edit_json, make_qwen3

MASK_ID = 64  # the tokenizer ends at 48: an id that leaves a gap
BLOCK = 4


@dataclass(frozen=True)
class Exported:
    source: Path
    checkpoint: Path
    a2d: Path
    plain: Path


def import_and_export(root: Path, source: Path, contract: BlockContract) -> Exported:
    made = Exported(source, root / "checkpoint", root / "a2d", root / "plain")
    with open_weights(source) as weights:
        import_hf.convert(weights, made.checkpoint, contract, "fp32")
    manifest, shape = read_manifest(made.checkpoint), read_shape(source)
    for model_format, out in (("a2d-qwen3", made.a2d), ("qwen3", made.plain)):
        export_hf.convert(
            made.checkpoint,
            out,
            manifest,
            shape,
            model_format=model_format,
            dtype="fp32",
            shard_bytes=300_000,
        )
    return made


@pytest.fixture(scope="module", params=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp(request.param)
    source = make_qwen3(root / "source", tied=request.param == "tied", seed=11, layers=2, shards=2)
    contract = BlockContract(mask_token_id=MASK_ID, block_size=BLOCK)
    return import_and_export(root, source, contract)


def load(exported: Exported) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(exported.a2d, trust_remote_code=True).eval()


@pytest.mark.parametrize("which", ["a2d", "plain"])
def test_every_tensor_comes_back_bit_for_bit(exported: Exported, which: str) -> None:
    with (
        open_weights(exported.source) as expected,
        open_weights(getattr(exported, which), read_shape(exported.source)) as found,
    ):
        assert found.names() == expected.names()
        assert len(found.files()) > 1
        for name in expected.names():
            assert torch.equal(found.get(name), expected.get(name)), name


def test_plain_export_is_the_same_autoregressive_model(exported: Exported) -> None:
    ids = torch.arange(20)[None]
    expected = Qwen3ForCausalLM.from_pretrained(exported.source)(ids).logits
    assert torch.equal(Qwen3ForCausalLM.from_pretrained(exported.plain)(ids).logits, expected)
    config = json.loads((exported.plain / "config.json").read_text())
    assert (config["block_size"], config["mask_token_id"]) == (BLOCK, MASK_ID)
    assert not list(exported.plain.glob("*.py"))


def test_the_tokenizer_knows_the_mask_token(exported: Exported) -> None:
    before = AutoTokenizer.from_pretrained(exported.source)
    after = AutoTokenizer.from_pretrained(exported.a2d, trust_remote_code=True)
    assert after.convert_tokens_to_ids(after.mask_token) == after.mask_token_id == MASK_ID
    assert after.get_vocab() == {**before.get_vocab(), "<|MASK|>": MASK_ID}
    messages = [{"role": "user", "content": "what is 12+7?"}]
    rendered = [
        t.apply_chat_template(messages, add_generation_prompt=True) for t in (before, after)
    ]
    assert rendered[0] == rendered[1]
    assert after("1<|MASK|>2").input_ids == [
        *before("1").input_ids,
        MASK_ID,
        *before("2").input_ids,
    ]


def test_masks(exported: Exported) -> None:
    """4-D masks are used as given; without one attention is bidirectional but for padding keys."""
    model = load(exported)
    masked_lm = AutoModelForMaskedLM.from_pretrained(exported.a2d, trust_remote_code=True)
    assert type(masked_lm).__name__ == type(model).__name__ == "A2DQwen3LMHeadModel"
    config = AutoConfig.from_pretrained(exported.a2d, trust_remote_code=True)
    assert (config.model_type, config.block_size) == ("a2d-qwen3", BLOCK)
    ids = torch.tensor([[5, 9, 2, 7, 30, 11]])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    expected = Qwen3ForCausalLM.from_pretrained(exported.source).eval()(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected)
    padding = torch.tensor([[1, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(
        model(ids, attention_mask=padding).logits[:, :5], model(ids[:, :5]).logits
    )
    assert (model(ids).logits - expected)[0, 0].abs().max() > 0.1  # the first position sees all


def brute_force(
    model: torch.nn.Module, prompt: list[int], limit: int, steps: int, threshold: float | None
) -> list[int]:
    """Static or dynamic greedy decoding, one row, no cache: the rules written out once more."""
    ends = model.generation_config.eos_token_id
    ids, start = list(prompt), len(prompt) // BLOCK * BLOCK
    while True:
        stop = start + BLOCK
        masked = [i for i in range(start, stop) if i >= len(prompt)]
        ids = ids[:start] + ids[start : len(prompt)] + [MASK_ID] * len(masked)
        number = 0
        while masked:
            position = torch.arange(stop)
            visible = (position[None] // BLOCK <= position[:, None] // BLOCK)[None, None]
            logits = model(torch.tensor([ids]), attention_mask=visible).logits[0].double()
            logits[:, 49:] = -torch.inf  # the mask token and ids that the tokenizer lacks
            probability, token = logits.softmax(-1).max(-1)
            quota = BLOCK // steps + (number < BLOCK % steps) if number < steps else BLOCK
            order = sorted(masked, key=lambda i: (-float(probability[i]), i))
            sure = [] if threshold is None else [i for i in masked if probability[i] > threshold]
            for i in {*order[:quota], *sure}:
                ids[i] = int(token[i])
                masked.remove(i)
            number += 1
        response = ids[len(prompt) :]
        end = next((i for i, t in enumerate(response) if t in ends), None)
        if end is not None or len(response) >= limit:
            return response[: min(limit, len(response) if end is None else end + 1)]
        start = stop


@pytest.mark.parametrize(
    ("steps", "threshold"), [(4, None), (2, None), (3, None), (1, None), (4, 0.3)]
)
def test_generate_equals_decoding_without_cache(
    exported: Exported, steps: int, threshold: float | None
) -> None:
    model = load(exported)
    for length in (1, 2, 3, 4, 5, 6, 7, 8):  # every residue, with and without clean blocks before
        prompt = [(11 * i + 3 * length) % 46 for i in range(length)]
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, denoising_steps=steps, threshold=threshold
        )
        expected = brute_force(model, prompt, 9, steps, threshold)
        assert found[0].tolist() == prompt + expected, length


def test_rows_do_not_depend_on_their_batch_and_end_early(exported: Exported) -> None:
    model = load(exported)
    prompts = torch.tensor([[(7 * i + 5 * row) % 46 for i in range(6)] for row in range(4)])
    alone = [model.generate(row[None], max_new_tokens=10)[0].tolist() for row in prompts]
    ending = alone[1][7]  # make a token that row 1 draws early an end token
    model.generation_config.eos_token_id = [ending]
    alone = [model.generate(row[None], max_new_tokens=10)[0].tolist() for row in prompts]
    together = model.generate(prompts, max_new_tokens=10).tolist()
    pad = model.generation_config.pad_token_id
    longest = max(map(len, alone))
    assert len(alone[1]) <= 8
    assert together == [row + [pad] * (longest - len(row)) for row in alone]


def test_temperature_is_keyed_by_the_seed(exported: Exported) -> None:
    model = load(exported)
    prompt = torch.tensor([[4, 8, 15, 16, 23]])

    def sample(seed: int) -> list[int]:
        made = model.generate(prompt, max_new_tokens=24, temperature=1.0, seed=seed)
        return made[0, 5:].tolist()

    assert sample(1) == sample(1) != sample(2)
    assert all(token < 49 for token in sample(1) + sample(2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"denoising_steps": 0}, "use 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "unpadded rows"),
    ],
)
def test_generate_refuses(exported: Exported, options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(exported).generate(torch.tensor([[1, 2]]), **options)


def test_an_export_can_be_imported_again(exported: Exported, tmp_path: Path) -> None:
    again = import_and_export(
        tmp_path, exported.a2d, read_manifest(exported.checkpoint).block_contract
    )
    for name in ("config.json", "tokenizer.json", "modeling_a2d.py", "chat_template.jinja"):
        assert (again.a2d / name).read_bytes() == (exported.a2d / name).read_bytes(), name


def test_weights_without_an_end_token_convert(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: only decoding needs an end token. Weights and config.json alone become a checkpoint
    and a plain export; where blocks are decoded, the refusal says what is missing."""
    source = Path(shutil.copytree(exported.source, tmp_path / "source"))
    for file in (*source.glob("*token*"), source / "generation_config.json"):
        file.unlink()
    edit_json(source / "config.json", eos_token_id=None, pad_token_id=None)

    def run(main: Callable[[], None], *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        main()

    run(import_hf.main, "--hf", source, "--out", tmp_path / "checkpoint", "--mask-token-id", 60)
    given = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out", "--format")
    with pytest.raises(InputError, match="names no end token, which decoding needs; set eos_token"):
        run(export_hf.main, *given, "a2d-qwen3")
    run(export_hf.main, *given, "qwen3")
    with open_weights(source) as expected, open_weights(tmp_path / "out") as found:
        assert all(torch.equal(found.get(n), expected.get(n)) for n in expected.names())


def test_verify_finds_one_changed_value(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: equal directories are told as equal, with a bar that is never more than full (an end
    token may save passes); the first tensor in which one bit differs is named."""
    manifest = read_manifest(exported.checkpoint)
    told: list[tuple[int, int]] = []  # bytes read so far, and in all

    class Watched(Progress):
        def advance(self, tokens: int = 0, count: int = 1, note: str = "") -> None:
            super().advance(tokens, count, note)
            told.append((self._done, self._total))

    monkeypatch.setattr(verify, "Progress", Watched)
    lines = list(verify.compare(exported.a2d, exported.checkpoint, manifest))
    done, total = told[-1]
    assert len({total for _, total in told}) == 1 and total / 2 < done <= total
    assert [line.split(":")[0] for line in lines] == ["weights", "logits", "tokens"]
    assert lines[2] == "tokens: greedy, 4 prompts of 5 to 8 tokens, equal"
    changed = Path(shutil.copytree(exported.a2d, tmp_path / "changed"))
    file = sorted(changed.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name, tensor = next(iter(tensors.items()))
    tensor.view(torch.int32).flatten()[7] ^= 1  # the last bit of one value
    save_file(tensors, file)
    with pytest.raises(RunError, match=f"{name} differs in 1 of {tensor.numel()} values"):
        list(verify.compare(changed, exported.checkpoint, manifest))


def test_verify_finds_another_arithmetic_and_runs_no_foreign_code(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(exported.checkpoint)
    changed = Path(shutil.copytree(exported.a2d, tmp_path / "changed"))
    with (changed / "modeling_a2d.py").open("a") as file:
        file.write("raise SystemExit('foreign code ran')\n")
    lines = list(verify.compare(changed, exported.checkpoint, manifest))
    assert "was not run" in lines[2]
    edit_json(changed / "config.json", rms_norm_eps=0.1)
    with pytest.raises(InputError, match=r"rms_eps=0\.1"):
        list(verify.compare(changed, exported.checkpoint, manifest))
    monkeypatch.setattr(verify, "read_shape", lambda *_, **__: read_shape(exported.source))
    with pytest.raises(RunError, match=r"config\.json disagree"):
        list(verify.compare(changed, exported.checkpoint, manifest))


def test_an_export_that_differs_gets_no_name(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*arguments: object, **options: object) -> list[str]:
        raise RunError("logits differ")

    monkeypatch.setattr(export_hf, "compare", differs)
    with pytest.raises(RunError, match="logits differ"):
        export_hf.convert(
            exported.checkpoint,
            tmp_path / "out",
            read_manifest(exported.checkpoint),
            read_shape(exported.source),
            model_format="qwen3",
            dtype="bf16",
        )
    assert list(tmp_path.iterdir()) == []


def export(exported: Exported, out: Path) -> None:
    """As the command does by default."""
    export_hf.convert(
        exported.checkpoint,
        out,
        read_manifest(exported.checkpoint),
        read_shape(exported.source),
        model_format="a2d-qwen3",
        dtype="bf16",
    )


def test_an_export_finds_a_damaged_tensor_and_another_configuration(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: one bit that a write loses, and a rope_theta that is not the checkpoint's, end an
    export by default; without them it says what it compared."""
    export(exported, tmp_path / "good")
    said = capsys.readouterr().out
    assert said.splitlines()[0].endswith("tensors read back equal bit for bit in bf16")
    assert said.splitlines()[2] == "verified tokens: greedy, 8 prompts of 5 to 12 tokens, equal"
    name = "model.layers.1.mlp.down_proj.weight"
    write, write_files = ShardWriter.write, export_hf.write_files

    def damaged(self: ShardWriter, written: str, tensor: torch.Tensor) -> int:
        if written == name:
            tensor = tensor.bfloat16()
            tensor.view(torch.int16).flatten()[-1] ^= 1
        return write(self, written, tensor)

    def other_theta(directory: Path, *arguments: Any, **options: Any) -> None:
        write_files(directory, *arguments, **options)
        edit_json(directory / "config.json", rope_theta=12345.0, rope_parameters=None)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ShardWriter, "write", damaged)
        with pytest.raises(RunError, match=f"{name} differs in 1 of"):
            export(exported, tmp_path / "damaged")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export_hf, "write_files", other_theta)
        with pytest.raises(InputError, match=r"rope_theta=12345\.0"):
            export(exported, tmp_path / "theta")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_the_sample_of_a_large_model_has_fewer_prompts() -> None:
    """Claim: six to eight prompts of a small model, two or three of a large one; they end at
    different places of their blocks."""
    for block in (4, 8, 16, 32):
        for parameters, least, most in ((10**6, 6, 8), (600_000_000, 3, 3), (8 * 10**9, 2, 2)):
            lengths = comparisons.SAMPLE.lengths(block, parameters)
            assert least <= len(lengths) <= most
            assert lengths[-1] == 3 * block
            assert block < lengths[0]
            assert len({length % block for length in lengths}) == min(block, len(lengths))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("key[None, :] // size <= query[:, None] // size", "key[None, :] <= query[:, None]"),
        ("position_ids=query[None]", "position_ids=(query - offset)[None]"),
        ("drawn.confidence.view(rows, size)", "-drawn.confidence.view(rows, size)"),
        ("drawn.token.view(rows, size)", "drawn.token.view(rows, size).roll(1, 1)"),
    ],
)
def test_an_export_finds_another_decoding(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    """Claim: the sample of tokens notices causal attention inside a block, positions that start
    again behind the cache, the least confident tokens first, and tokens in the wrong place."""
    code = Path(shutil.copytree(exported.a2d, tmp_path / "code"))
    text = (code / "block_diffusion.py").read_text()
    assert text.count(right) == 1
    (code / "block_diffusion.py").write_text(text.replace(right, wrong))
    files = tuple(code.glob("*.py"))
    monkeypatch.setattr(comparisons, "code_of", lambda _: files)
    with pytest.raises(RunError, match="greedy tokens differ"):
        export(exported, tmp_path / "out")


@pytest.mark.parametrize(("imported", "dtype"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_other_types_round_once(
    exported: Exported, tmp_path: Path, imported: str, dtype: str
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    with open_weights(exported.source) as weights:
        import_hf.convert(weights, checkpoint, BlockContract(mask_token_id=MASK_ID), imported)
        manifest = read_manifest(checkpoint)
        options = {"model_format": "a2d-qwen3", "dtype": dtype}
        export_hf.convert(checkpoint, out, manifest, weights.model_shape, **options)
        with open_weights(out) as found:
            assert found.stored_dtype() == dtype
            for name in found.names():
                expected = weights.get(name).bfloat16()
                assert torch.equal(found.get(name).bfloat16(), expected), name
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto")
    assert loaded.dtype is {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape == (1, 7)
