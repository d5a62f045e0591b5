"""Claim: our autoregressive mode gives transformers' greedy tokens of a real model,
SmolLM2-135M-Instruct as examples/smollm2 fetches it, before and after a row is appended to its
vocabulary. Slow: it downloads
93 MB."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.run import write_questions
from launch.stages import ROOT, python
from megatron_opdlm.prompts import render

TOKENS, QUESTIONS = 48, 6


def run_command(argv: list[str]) -> None:
    subprocess.run(argv, check=True, timeout=900, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_tokens_of_a_real_model(tmp_path: Path) -> None:
    model, imported = tmp_path / "model", tmp_path / "imported"
    fetched = ("--packages", str(tmp_path / "packages"), "--out", str(model))
    run_command(python("examples.smollm2.fetch", *fetched))
    given = ("--hf", str(model), "--out", str(imported), "--add-mask-token")
    run_command(python("checkpoint_tools.import_hf", *given))
    write_questions(tmp_path / "data")
    lines = (tmp_path / "data" / "held_out.jsonl").read_text().splitlines()[:QUESTIONS]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    flags = ("--mode", "ar", "--max-new-tokens", str(TOKENS))
    paths = ("--model", str(imported), "--prompts", str(prompts), "--out", str(out))
    run_command(python("evaluation.sample", *paths, *flags))
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for line in out.read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([render({"question": row["question"]}, tokenizer, False)])
        made = reference.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        expected = made[0, ids.shape[1] :].tolist()
        assert row["response_ids"] == expected[: len(row["response_ids"])]
        assert len(row["response_ids"]) in (len(expected), len(expected) - 1)
