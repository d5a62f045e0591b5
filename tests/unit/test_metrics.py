"""Each step stands once in the metrics file, whatever was killed before; one rank writes."""

import json
import math
from pathlib import Path

import pytest

from megatron_opdlm.configuration.learning import LoggingConfig
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.metrics import MetricsWriter, forget_after, scalars
from megatron_opdlm.reporting.trackers import TrackedRun, open_trackers


def writer(run_dir: Path, *, start_step: int = 0, enabled: bool = True, trackers=()):
    return MetricsWriter(
        run_dir, enabled=enabled, total_steps=10, start_step=start_step, trackers=trackers
    )


def opened(run_dir: Path, start_step: int = 0, **keys):
    """The trackers that these keys of ``logging`` ask for."""
    logging = LoggingConfig(**{"tensorboard": False, **keys})
    run = TrackedRun(directory=run_dir, start_step=start_step, logging=logging, settings={})
    return open_trackers(run)


SAMPLE = {
    "prompt": "2 + 2",
    "response_ids": [1, 2, 3, 4],
    "response_texts": ["<b>", " **4**", "\n", " after the end"],
    "committed_at": [1, 2, 12, 3],
    "response_tokens": 3,
    "finish_reason": "stop",
    "forwards": 4,
}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_line_a_step_on_disk_at_once(tmp_path):
    metrics = writer(tmp_path / "run")
    metrics.write(1, {"loss": 0.5, "kl_by_masked_fraction": {"0.25": 0.1}})
    assert read(tmp_path / "run/metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "kl_by_masked_fraction": {"0.25": 0.1}}
    ]
    metrics.write(2, {"loss": 0.25})
    assert [row["step"] for row in read(tmp_path / "run/metrics.jsonl")] == [1, 2]
    metrics.close()


def test_samples_carry_their_step_and_any_text(tmp_path):
    metrics = writer(tmp_path)
    metrics.samples(3, [{"response": "a\u2028b 数"}, {"response": "\ud800", "extra": {1, 2}}])
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().split(b"\n")[:2]]
    assert [row["step"] for row in rows] == [3, 3]
    assert [row["response"] for row in rows] == ["a\u2028b 数", "\ud800"]
    assert "数" in (tmp_path / "samples.jsonl").read_text()


def test_resume_forgets_later_steps_and_a_line_that_was_cut_short(tmp_path):
    first = writer(tmp_path)
    for step in range(1, 6):
        first.write(step, {"loss": 1.0 / step})
        first.samples(step, [{"response": "x\u2028y"}, {"response": "z"}])
    first.close()
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write('{"step": 3, "loss": "é'.encode()[:-1])
    second = writer(tmp_path, start_step=3)
    second.write(4, {"loss": 9.0})
    second.close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read(tmp_path / "metrics.jsonl")[3]["loss"] == 9.0
    lines = (tmp_path / "samples.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3]


def test_an_evaluation_stands_in_its_own_file_and_in_its_step_s_line(tmp_path):
    """Step 0 has no line of its own; a resumed run forgets the evaluations of later steps."""
    first = writer(tmp_path)
    first.evaluation(0, {"score": 0.0}, {"evaluation_score": 0.0})
    for step in (1, 2):
        first.write(step, {"loss": 1.0 / step})
    first.evaluation(2, {"score": math.nan}, {"evaluation_score": 0.5})
    first.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5, "evaluation_score": 0.5},
    ]
    assert read(tmp_path / "evaluation.jsonl") == [
        {"step": 0, "score": 0.0},
        {"step": 2, "score": None},
    ]
    writer(tmp_path, start_step=1).close()
    assert read(tmp_path / "evaluation.jsonl") == [{"step": 0, "score": 0.0}]
    assert not list(tmp_path.glob("*.tmp"))


def test_start_at_zero_forgets_everything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    writer(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    forget_after(tmp_path / "nowhere.jsonl", 0)
    assert not (tmp_path / "nowhere.jsonl").exists()


@pytest.mark.parametrize("damaged", ["{", "[]", '{"loss": 1}', "\udcff"])
def test_a_damaged_line_is_named(tmp_path, damaged):
    """Claim: only a last line that was cut short is dropped in silence."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damaged.encode(errors="surrogateescape") + b"\n")
    before = file.read_bytes()
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 is damaged"):
        forget_after(file, 1)
    assert file.read_bytes() == before


def test_numbers_that_json_has_not_are_null(tmp_path):
    metrics = writer(tmp_path)
    metrics.write(1, {"loss": math.nan, "by": [1.0, math.inf]})
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "by": [1.0, None]}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    metrics = writer(tmp_path / "run", enabled=False)
    metrics.write(1, {"loss": 1.0})
    metrics.samples(1, [{"response": "a"}])
    metrics.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_progress_shows_what_one_watches(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Claim: where nobody watches, by a line with an estimate now and then, and no bar."""
    monkeypatch.setattr("megatron_opdlm.reporting.progress.LINE_SECONDS", 0.0)
    metrics = writer(tmp_path, start_step=4)
    metrics.write(
        5,
        {"loss": 0.51, "kl": 0.37, "trained_tokens_per_second": 1234.5, "max_new_tokens": 48},
    )
    metrics.close()
    said = capsys.readouterr().err
    assert said == (
        "train: 5 of 10 steps, loss=0.51, KL=0.37, tok/s=1234, length=48, 0.0 minutes left\n"
    )


def test_scalars_names_nested_numbers_and_leaves_out_the_rest():
    found = dict(scalars({"loss": 1, "by": {"a": 2.0, "b": [3, None]}, "text": "x", "none": None}))
    assert found == {"loss": 1.0, "by/a": 2.0, "by/b/0": 3.0}


def test_tensorboard_has_every_scalar_of_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = writer(tmp_path, trackers=opened(tmp_path, tensorboard=True))
    for step in (1, 2, 3):
        first.write(step, {"loss": 10.0 * step, "by": {"a": 1.0}})
    first.close()
    second = writer(tmp_path, start_step=2, trackers=opened(tmp_path, 2, tensorboard=True))
    second.write(3, {"loss": 99.0, "by": {"a": 1.0}})
    second.samples(3, [SAMPLE])
    second.evaluation(3, {}, {"evaluation": {"addition": {"accuracy": 0.25}}})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 10.0), (2, 20.0), (3, 99.0)]
    [score] = events.Scalars("evaluation/addition/accuracy")
    assert (score.step, score.value) == (3, 0.25)
    assert events.Tags()["scalars"] == ["loss", "by/a", "evaluation/addition/accuracy"]
    [text] = events.Tensors("samples/0/text_summary")
    assert text.step == 3 and text.tensor_proto.string_val[0].decode() == (
        "    prompt: 2 + 2\n    response (3 tokens, stop, 4 forwards):\n    <b>₁ **4**₂\n    ₁₂\n"
    )


THEIRS = """
class Theirs:
    run_id = None
    def __init__(self, run): self.file = (run.directory / "theirs.txt").open("a")
    def log(self, step, numbers): print(step, sorted(numbers.items()), file=self.file)
    def texts(self, step, texts): print(step, sorted(texts), file=self.file)
    def close(self): self.file.close()
def open_tracker(run):
    return Theirs(run)
"""


def test_a_tracker_is_one_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Claim: a module of the user's that ``logging.trackers`` names gets numbers and texts; one
    that is missing, or is no tracker, is named."""
    (tmp_path / "their_tracker.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    metrics = writer(tmp_path, trackers=opened(tmp_path, trackers=["their_tracker"]))
    metrics.write(1, {"loss": 0.5, "by": {"a": 2}})
    metrics.samples(1, [SAMPLE])
    metrics.close()
    kept = (tmp_path / "theirs.txt").read_text()
    assert kept == "1 [('by/a', 2.0), ('loss', 0.5)]\n1 ['samples/0']\n"
    with pytest.raises(InputError, match=r"logging.trackers=no_such_module cannot be imported"):
        opened(tmp_path, trackers=["no_such_module"])
    with pytest.raises(InputError, match=r"logging.trackers=json has no open_tracker\(run\)"):
        opened(tmp_path, trackers=["json"])


def test_a_note_is_said_once(tmp_path, capsys):
    """Claim: on the writer's terminal; other ranks say nothing."""
    metrics, other = writer(tmp_path), writer(tmp_path, enabled=False)
    for _ in range(3):
        metrics.say_once("nothing to learn in this step")
        other.say_once("nothing to learn in this step")
    metrics.say_once("something else")
    metrics.close()
    said = capsys.readouterr().err
    assert said.count("note: nothing to learn in this step") == 1
    assert said.count("note: something else") == 1
