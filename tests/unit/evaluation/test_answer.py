"""evaluation.answer: a data file that training reads, of a model's own answers, made once."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import answer
from evaluation.answer import Answers
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.off_policy import require_responses
from megatron_opdlm.prompts import load_prompts
from tests.conftest import VOCABULARY, TinyModels

LENGTH = 24
QUESTIONS = [f"{'ab' * (i % 5)}{i}+1=" for i in range(12)]


@pytest.fixture
def command(models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command on a tiny model; ``out`` is under the test's directory."""
    prompts = tmp_path / "prompts.json"
    rows = [{"question": text, "domain": "math", "source": i} for i, text in enumerate(QUESTIONS)]
    prompts.write_text(json.dumps(rows))

    def run(out: str, *flags: str) -> Path:
        path, model = tmp_path / out, models.hf("student", tied=True)
        argv = ["--model", str(model), "--prompts", str(prompts), "--out", str(path)]
        argv += ["--max-new-tokens", str(LENGTH), "--temperature", "1", *flags]
        monkeypatch.setattr("sys.argv", ["answer", *argv])
        answer.main()
        return path

    return run


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())


def test_a_killed_run_goes_on_and_gives_the_same_file(command, models, tmp_path, monkeypatch):
    """Claim: what a kill left, its last line torn, is not made again and changes nothing; rows keep
    their keys and order, training reads every one of them; the manifest says where they are from
    and what was left out; other settings are refused."""
    whole = command("whole.jsonl", "--keep-truncated")
    add, died = Answers.add, RuntimeError("killed")

    def die(self: Answers, *what: Any) -> None:
        add(self, *what)
        if len(self.found) == 5:
            with self._path.open("ab") as file:
                file.write(b'{"index": 7, "resp')
            raise died

    monkeypatch.setattr(Answers, "add", die)
    with pytest.raises(RuntimeError):
        command("again.jsonl", "--keep-truncated")
    made: list[int] = []
    monkeypatch.setattr(Answers, "add", lambda self, t, s: (made.append(0), add(self, t, s))[1])
    with pytest.raises(InputError, match=r"again\.jsonl\.part: holds answers that differ in seed"):
        command("again.jsonl", "--keep-truncated", "--seed", "5")
    again = command("again.jsonl", "--keep-truncated")
    assert len(made) == len(QUESTIONS) - 5
    assert again.read_text() == whole.read_text()
    assert not list(tmp_path.glob("*.part"))
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    assert set(rows[0]) == {"question", "domain", "source", "response"}
    prompts = load_prompts(
        whole,
        load_tokenizer(models.hf("student", tied=True)),
        enable_thinking=False,
        max_prompt_tokens=None,
        vocab_size=VOCABULARY,
    ).prompts
    require_responses(prompts, "mixing.path")
    found = manifest_of(whole)
    assert found["sha256"] == content_hash(whole) and found["mode"] == "ar"
    assert found["prompts_sha256"] == content_hash(tmp_path / "prompts.json")
    assert found["rows"] + sum(found["left_out"].values()) == len(QUESTIONS)
    with pytest.raises(InputError, match="exists already"):
        command("whole.jsonl")


def test_a_kill_between_the_answers_and_their_manifest(command, monkeypatch):
    """Claim: the same command writes both, and has no answer to make."""
    wrote = answer.write_json

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(answer, "write_json", die)
    with pytest.raises(RuntimeError):
        command("answers.jsonl", "--keep-truncated")
    monkeypatch.setattr(answer, "write_json", wrote)
    monkeypatch.setattr(Answers, "add", lambda *_: pytest.fail("it was made already"))
    path = command("answers.jsonl", "--keep-truncated")
    assert manifest_of(path)["sha256"] == content_hash(path)


def test_answers_that_were_cut_off_are_left_out(command):
    """Claim: by default, and counted; the others are the same ones."""
    kept = command("kept.jsonl", "--keep-truncated")
    ended = command("ended.jsonl")
    lost = manifest_of(ended)["left_out"]["truncated"]
    lines = ended.read_text().splitlines()
    assert lost > 0 and len(lines) == manifest_of(kept)["rows"] - lost
    assert set(lines) < set(kept.read_text().splitlines())
