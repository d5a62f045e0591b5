"""What samples say of single tokens is what teacher and student compute there."""

import json
from pathlib import Path

import pytest

from tests import oracle, training_run
from tests.conftest import MASK
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.layouts import overrides as layout_overrides
from tests.distributed.workers import WorkerGroups

pytestmark = pytest.mark.distributed
BLOCK = 4


def samples(run: Path) -> list[dict]:
    """Those of the first step."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] == 1]


def test_samples_have_confidence_divergence_and_the_teachers_choice(plain: Path, model: Path):
    """Claim: of the first step's samples, each token's confidence is a probability; where the
    trained state had it masked, the divergence there and the teacher's three likeliest tokens are
    those of transformers' models; elsewhere nothing is said."""
    reference = oracle.load(model)
    seen = 0
    for row in samples(plain):
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


def test_every_layout_says_the_same(
    ranks: WorkerGroups, plain: Path, model: Path, prompts: Path, tmp_path: Path
):
    """Claim: whichever ranks hold the vocabulary, the layers, the sequences or their tokens."""
    expected = samples(plain)
    assert any(kl is not None for row in expected for kl in row["kl"])
    for name in ("tp2", "pp2", "dp2", "cp2"):
        number, layout = LAYOUTS[name]
        out = tmp_path / name
        keys = ["train.steps=8", "train.stop_after=1", *layout_overrides(layout)]
        command = training_run.overrides(model, prompts, out, *keys)
        ranks(number).run(jobs.train_run, overrides=command, timeout=120)
        for ours, theirs in zip(samples(out), expected, strict=True):
            assert ours["response_ids"] == theirs["response_ids"]
            assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=1e-3), name
            for key in ("kl", "teacher"):
                assert [x is None for x in ours[key]] == [x is None for x in theirs[key]]
            pairs = zip(ours["kl"], theirs["kl"], strict=True)
            for mine, other in ((a, b) for a, b in pairs if b is not None):
                assert mine == pytest.approx(other, rel=1e-3, abs=1e-5), name
            tops = [t for t in zip(ours["teacher"], theirs["teacher"], strict=True) if t[1]]
            for mine, other in tops:
                assert [token for token, _ in mine] == [token for token, _ in other], name
                assert [p for _, p in mine] == pytest.approx([p for _, p in other], rel=1e-3)
