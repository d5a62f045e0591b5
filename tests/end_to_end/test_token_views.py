"""What samples say of single tokens is what teacher and student compute there."""

import json
from pathlib import Path

import pytest

from tests import oracle
from tests.conftest import MASK

BLOCK = 4


def test_samples_have_confidence_divergence_and_the_teachers_choice(plain: Path, model: Path):
    """Claim: of the first step's samples, each token's confidence is a probability; where the
    trained state had it masked, the divergence there and the teacher's three likeliest tokens are
    those of transformers' models; elsewhere nothing is said."""
    reference = oracle.load(model)
    lines = (plain / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] == 1]
    seen = 0
    for row in rows:
        prompt, response, at = row["prompt_ids"], row["response_ids"], row["committed_at"]
        assert all(0 < p <= 1 for p in row["confidence"]) and len(row["confidence"]) == len(at)
        teacher = oracle.causal_logits(reference, [*prompt, *response])[len(prompt) - 1 : -1]
        masked = [False] * len(response)
        blocks = [(len(prompt) + i) // BLOCK for i in range(len(response))]
        for block in set(blocks):
            inside = [i for i in range(len(response)) if blocks[i] == block]
            counted = [at[i] for i in inside if row["kl"][i] is not None]
            for i in inside:
                masked[i] = bool(counted) and at[i] >= min(counted)
        student = oracle.student_logits(
            reference, prompt, response, masked, block_size=BLOCK, mask_id=MASK
        )
        for i, kl in enumerate(row["kl"]):
            assert (kl is None) == (row["teacher"][i] is None)
            if kl is None:
                assert not masked[i] or i >= row["response_tokens"]
                continue
            log_p, log_q = teacher[i].log_softmax(-1), student[i].log_softmax(-1)
            ends = row["finish_reason"] == "stop"
            last = max(j for j in range(len(response)) if blocks[j] == blocks[i])
            if not ends or last < row["response_tokens"]:  # all of its block is under loss
                expected = float((log_p.exp() * (log_p - log_q)).sum())
                assert kl == pytest.approx(expected, rel=1e-3, abs=1e-5)
                seen += 1
            best = log_p.topk(3)
            tokens = [token for token, _ in row["teacher"][i]]
            texts = row.get("response_texts")
            if texts is None:
                assert tokens == best.indices.tolist()
            probabilities = [p for _, p in row["teacher"][i]]
            assert probabilities == pytest.approx(best.values.exp().tolist(), rel=1e-3)
    assert seen >= 2
