"""Claims: runs in step load every part once for all of them and fail together; a model card states
what files record and nothing else; engine settings are those of the training."""

import json
import threading
from pathlib import Path

import pytest
import yaml

from checkpoint_tools.export.engine_settings import (
    EngineSettings,
    engine_settings,
    read_lmdeploy,
    read_sglang,
    write_engine_settings,
)
from checkpoint_tools.export.mask_registration import register_mask
from checkpoint_tools.export.model_card import model_card, read_evaluation
from checkpoint_tools.export.training_record import TrainingRecord, read_training_record
from checkpoint_tools.streaming.shared_loading import SharedLoading
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.families import QWEN3
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.model_files.shape import ModelShape
from megatron_opdlm.model_files.vocabulary import load_tokenizer, mask_token
from tests.tiny_models import make_qwen3, make_tokenizer

SHAPE = ModelShape(2, 64, 4, 2, 32, 96, 67, False, 1e6, 1e-6, 512)
CONTRACT = BlockContract(mask_token_id=64, block_size=4)


def test_runs_of_different_lengths_share_every_load() -> None:
    loading, loaded, seen = SharedLoading(), [], []
    passes = {"long": 3, "short": 1, "middle": 2}
    current: list[str] = []

    def run(name: str) -> str:
        for number in range(passes[name]):
            for part in "abc":

                def load(part: str = part, number: int = number) -> None:
                    loaded.append((number, part))
                    current[:] = [part]

                loading.arrive(load)
                seen.append((name, number, part, current[0]))
        return name

    def runner(name: str) -> "object":
        return lambda: run(name)

    results = loading.run([runner(name) for name in passes])  # type: ignore[arg-type]
    assert results == list(passes)
    assert loaded == [(number, part) for number in range(3) for part in "abc"]
    assert all(part == there for _, _, part, there in seen)
    assert len(seen) == 3 * sum(passes.values())
    loading.arrive(lambda: loaded.append((9, "alone")))  # the caller is a run of its own again
    assert loaded[-1] == (9, "alone")


def test_a_load_that_fails_ends_every_run() -> None:
    loading, before = SharedLoading(), threading.active_count()

    def fail() -> None:
        raise RunError("no such tensor")

    with pytest.raises(RunError, match="no such tensor"):
        loading.run([lambda: loading.arrive(fail)] * 3)
    assert threading.active_count() == before


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    counts = {"step": 483, "cumulative_trained_tokens": 1234567}
    (tmp_path / "state.json").write_text(json.dumps(counts))
    config = {
        "model": {"path": "/home/somebody/models/Qwen3-0.6B"},
        "teacher": {"path": ""},
        "rollout": {
            "block_size": 8,
            "denoising_steps": 6,
            "remasking": "low_confidence_dynamic",
            "threshold": 0.85,
        },
        "optimizer": {"lr": 1e-5},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def card(record: TrainingRecord, name: str = "sdar", **options: object) -> str:
    settings = engine_settings(4, record)
    chosen = {"layout": QWEN3.formats[name], "dtype": "bf16", **options}
    return model_card(SHAPE, CONTRACT, record, settings, **chosen)  # type: ignore[arg-type]


def test_a_card_states_what_is_recorded(checkpoint: Path) -> None:
    text = card(read_training_record(checkpoint))
    for line in (
        "| training steps | 483 |",
        "| trained response tokens | 1,234,567 |",
        "| teacher | Qwen3-0.6B |",
        "| block size (tokens) | 8 |",
        "| confidence threshold | 0.85 |",
    ):
        assert line in text, line
    assert "/home/somebody" not in text
    assert "None was given to the exporter" in text
    assert "base_model" not in text
    assert 'base_model: "Qwen/Qwen3-0.6B"' in card(TrainingRecord(), base_model="Qwen/Qwen3-0.6B")


def test_a_card_of_an_imported_model_claims_no_training() -> None:
    text = card(TrainingRecord())
    assert "this project has not trained them" in text
    assert "None by this project." in text
    assert "sglang" in text and "lmdeploy serve" in text
    assert "lmdeploy" not in card(TrainingRecord(), "a2d-qwen3")
    assert "trust_remote_code" not in card(TrainingRecord(), "qwen3")


def test_a_card_says_in_which_type_tokens_are_the_samplers() -> None:
    exact = "dtype=torch.float32)"
    assert exact in card(TrainingRecord()) and "computes in float32" in card(TrainingRecord())
    assert exact not in card(TrainingRecord(), dtype="fp32")  # the stored type is the exact one
    assert exact not in card(TrainingRecord(), quantized=True)  # which no sampler of ours reads


def test_evaluation_rows_are_the_tables_rows(tmp_path: Path) -> None:
    row = {
        "task": "gsm8k",
        "n": 1319,
        "accuracy": 0.7544,
        "stderr": 0.0119,
        "tokens_per_denoising_step": 2.5,
        "tokens_per_forward": 2.25,
        "settings": {
            "remasking": "low_confidence_dynamic",
            "threshold": 0.9,
            "denoising_steps": 4,
            "block_size": 4,
        },
    }
    slower = {**row, "tokens_per_forward": 0.9, "stderr": None}
    file = tmp_path / "summary.json"
    file.write_text(json.dumps([row, slower]))
    text = card(TrainingRecord(), evaluation=read_evaluation([file]))
    rule = "low_confidence_dynamic, threshold 0.9, 4 steps a block of 4"
    found = [line for line in text.splitlines() if line.startswith("| gsm8k")]
    assert found == [
        f"| gsm8k | {rule} | 1319 | 0.7544 | - | 2.50 | 0.90 |",
        f"| gsm8k | {rule} | 1319 | 0.7544 | 0.0119 | 2.50 | 2.25 |",
    ]


@pytest.mark.parametrize("content", ["{", "{}", '[{"task": "gsm8k"}]', "[1]"])
def test_another_file_is_no_evaluation(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match=r"give the summary\.json"):
        read_evaluation([tmp_path / "summary.json"])
    with pytest.raises(InputError, match="cannot be read"):
        read_evaluation([tmp_path / "nowhere.json"])


def test_engine_settings_are_those_of_the_training(checkpoint: Path, tmp_path: Path) -> None:
    settings = engine_settings(8, read_training_record(checkpoint))
    assert settings == EngineSettings(
        block_size=8, denoising_steps=6, threshold=0.85, strategy="low_confidence_dynamic"
    )
    write_engine_settings(tmp_path, settings)
    assert read_sglang(tmp_path) == {"block_size": 8, "threshold": 0.85}
    assert read_lmdeploy(tmp_path) == {
        "--backend": "pytorch",
        "--dllm-block-length": "8",
        "--dllm-denoising-steps": "6",
        "--dllm-unmasking-strategy": "low_confidence_dynamic",
        "--dllm-confidence-threshold": "0.85",
    }


def test_settings_without_a_threshold_or_with_a_schedule() -> None:
    static = TrainingRecord(settings={"rollout.remasking": "low_confidence_static"})
    assert static.thresholds == []
    assert engine_settings(4, static).strategy == "low_confidence_static"
    assert engine_settings(4, static).threshold == 0.9
    entropy = TrainingRecord(settings={"rollout.remasking": "entropy_bounded"})
    assert engine_settings(4, entropy).strategy == "low_confidence_dynamic"
    schedule = {"enabled": True, "start": 0.9, "end": 0.7}
    settings = {f"threshold_schedule.{key}": value for key, value in schedule.items()}
    ramp = TrainingRecord(settings={"rollout.remasking": "low_confidence_dynamic", **settings})
    assert ramp.thresholds == [0.9, 0.7]
    assert engine_settings(4, ramp).threshold == 0.7


@pytest.mark.parametrize("text", ["<|MASK|>", "<|mask|>", "<MASK>"])
def test_a_mask_token_that_is_only_added_is_found(tmp_path: Path, text: str) -> None:
    directory = make_qwen3(tmp_path / "model", tied=True, seed=1, layers=1)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([text], special_tokens=True)
    tokenizer.save_pretrained(directory)
    assert mask_token(directory) == 49
    register_mask(directory, 49)
    after = load_tokenizer(directory)
    assert after is not None
    assert (after.mask_token, after.mask_token_id) == (text, 49)


def test_every_tokenizer_file_learns_a_registered_mask_token(tmp_path: Path) -> None:
    make_tokenizer(mask_token="<|mask|>").save_pretrained(tmp_path)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
    register_mask(tmp_path, 49)
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<|mask|>": 49}
    named = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert named == {"mask_token": "<|mask|>"}
