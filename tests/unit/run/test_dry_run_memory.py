"""Claim: the estimate of a rank's memory in the update counts the cache where it stays."""

from dataclasses import replace

import pytest

from megatron_opdlm import hardware
from megatron_opdlm.config import load_config
from megatron_opdlm.planning.rank_memory import Split
from megatron_opdlm.run import dry_run


def test_the_cache_that_stays(monkeypatch: pytest.MonkeyPatch):
    """By hand: Qwen3-0.6B on two tensor ranks holds 2 x 28 layers x 4 groups x 128 numbers of four
    bytes a token; 64 responses on four copies are 16 slots of 1,024 + 2,048 positions, more than
    the budget of 20,000. On a CPU nothing is captured, and nothing stays."""
    config = load_config(
        None,
        [
            *("model.path=Qwen3-0.6B", "model.tensor_parallel=2", "data.max_prompt_tokens=1024"),
            *("rollout.max_new_tokens=2048", "rollout.prompts_per_step=64", "model.dtype=fp32"),
            "rollout.kv_cache_tokens=20000",
        ],
    )
    source, _ = dry_run._open("model.path", config.model.path, None)
    split = Split(tensor=2, data=4)

    def shown() -> str:
        (line,) = (x for x in dry_run._memory(config, source, source, split) if "the update" in x)
        return line

    record = hardware.select_hardware()
    alone = shown()
    monkeypatch.setattr(
        hardware, "select_hardware", lambda: replace(record, captures=lambda: lambda run: run)
    )
    kept = 20_000 * 2 * 28 * 4 * 128 * 4 / 2**30
    assert f"{kept:.3f} of it is the KV cache, which stays" in shown()
    total = float(alone.split()[3]) + kept
    assert float(shown().split()[3]) == pytest.approx(total, abs=0.002)
    assert "KV cache" not in alone
