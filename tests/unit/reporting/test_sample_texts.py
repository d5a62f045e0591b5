"""Rows of ``samples.jsonl``."""

from megatron_opdlm.records import Prompt, TokenView, Trajectory
from megatron_opdlm.reporting.sample_texts import sample_rows
from tests.tiny_models import make_tokenizer


def test_every_token_of_the_response_has_its_own_text(tmp_path):
    """Claim: a text for each id, those after the end token included, special tokens written out,
    the teacher's too; without a tokenizer the ids stand alone."""
    tokenizer = make_tokenizer("abcd")
    ids = [*tokenizer.convert_tokens_to_ids(["b", "a", "<|im_end|>", "d"])]
    trajectory = Trajectory(
        sample=1,
        prompt=Prompt(index=0, ids=[0]),
        response_ids=ids,
        committed_at=[1, 2, 1, 2],
        response_tokens=3,
        finish_reason="stop",
        forwards=3,
        passes=2,
        confidence=[0.123456, 1.0, 0.5, 0.25],
    )
    seen = TokenView(sample=1, position=1, masked=2, value=0.0123456, teacher=[(ids[2], 0.75)])
    views = {1: {1: seen}}
    (tmp_path / "ids").mkdir()
    tokenizer.save_pretrained(tmp_path / "texts")
    [row] = sample_rows([trajectory], tmp_path / "texts", views)
    assert row["confidence"] == [0.1235, 1.0, 0.5, 0.25]
    assert row["kl"] == [None, 0.01235, None, None]
    assert row["teacher"] == [None, [["<|im_end|>", 0.75]], None, None]
    assert row["response_texts"] == ["b", "a", "<|im_end|>", "d"]
    assert row["response"] == "ba<|im_end|>"
    [bare] = sample_rows([trajectory], tmp_path / "ids", views)
    assert bare["teacher"][1] == [[ids[2], 0.75]]
    assert "response_texts" not in bare and bare["response_ids"] == ids
