"""Evaluations that go on: after a kill, after an installation, and never with anything else."""

import json
import shutil
import types

import pytest

from evaluation.generation import verdicts
from evaluation.generation.predictions import Predictions
from evaluation.run import evaluate, load_tasks
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from tests.unit.evaluation.test_run import AnsweringGenerator, data

__all__ = ["data"]  # a fixture


class Killed(Exception):
    """Stands for the end of the process."""


class DyingGenerator(AnsweringGenerator):
    def generate(self, prompts, decoding, samples, finished=lambda _: None):
        [*_, last] = super().generate(prompts, decoding, samples)
        finished(last)
        raise Killed


def test_what_is_finished_is_not_made_again(data):
    """Claim: after a kill the missing responses alone are asked for; the files are those of an
    evaluation that was not killed; a finished one asks for nothing."""
    tasks, out = load_tasks(["addition"], data, None), data / "killed"
    settings = (Decoding(temperature=1.0), 2, {})
    with pytest.raises(Killed):
        evaluate(DyingGenerator(offset=1), tasks, *settings, out=out)
    [line] = (out / "predictions.jsonl").read_text().splitlines()
    assert (json.loads(line)["index"], json.loads(line)["sample"]) == (1, 1)
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"task": "addition", "ind')  # torn
    generator = AnsweringGenerator(offset=1)
    [resumed], predictions = evaluate(generator, tasks, *settings, out=out)
    assert [samples for _, samples in generator.seen] == [[0, 1 << 32, 1]]
    [whole], expected = evaluate(AnsweringGenerator(offset=1), tasks, *settings)
    assert predictions == expected
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert json.loads((out / "summary.json").read_text()) == [resumed]
    written = (out / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in written] == expected
    finished = AnsweringGenerator()
    assert evaluate(finished, tasks, *settings, out=out) == ([resumed], [])
    assert not finished.seen


def test_verdicts_are_kept_when_the_grading_is_killed(data, monkeypatch, capsys):
    """Claim: graded problems are not graded again, unless their responses are others now; the
    results are those of an undisturbed evaluation; how far the grading is, is said."""
    tasks, out = load_tasks(["addition"], data, None), data / "killed"
    settings = (Decoding(temperature=1.0), 2, {})
    [whole], expected = evaluate(AnsweringGenerator(offset=1), tasks, *settings)
    monkeypatch.setattr(verdicts, "FIRST_PART", 1)
    monkeypatch.setattr(verdicts, "PART_SECONDS", 0.0)
    monkeypatch.setattr("megatron_opdlm.reporting.progress.LINE_SECONDS", 0.0)
    real, asked = verdicts.grade_predictions, []

    def grade(task, rows, predictions, lives=1):
        asked.append([row["index"] for row in predictions])
        if len(asked) > lives:
            raise Killed
        return real(task, rows, predictions)

    monkeypatch.setattr(verdicts, "grade_predictions", grade)
    with pytest.raises(Killed):
        evaluate(AnsweringGenerator(offset=1), tasks, *settings, out=out, show=True)
    assert "addition, graded: 2 of 4 responses" in capsys.readouterr().err
    assert len((out / "graded.partial.jsonl").read_text().splitlines()) == 1
    copies = [shutil.copytree(out, data / name) for name in ("same", "changed")]
    lines = (copies[1] / "predictions.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["index"] != 0]  # made again, another way
    (copies[1] / "predictions.jsonl").write_text("".join(line + "\n" for line in kept))
    for copy, offset, again in zip(copies, (1, 0), ([[1]], [[0], [1]]), strict=True):
        asked.clear()
        monkeypatch.setattr(grade, "__defaults__", (9,))
        [resumed], predictions = evaluate(AnsweringGenerator(offset), tasks, *settings, out=copy)
        assert asked == again
        if offset == 1:
            assert predictions == expected
            assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
        assert not (copy / "graded.partial.jsonl").exists()


def test_a_graded_task_is_kept_when_a_later_one_is_killed(data):
    """Claim: its rows and its summary row stand, and its grader is not asked again."""
    (data / "exact_match.jsonl").write_text('{"question": "1+1=", "answer": "#2"}\n')
    tasks, out = load_tasks(["addition", "exact_match"], data, None), data / "killed"

    class DiesLater(AnsweringGenerator):
        def generate(self, prompts, decoding, samples, finished=lambda _: None):
            if self.seen:
                raise Killed
            return super().generate(prompts, decoding, samples, finished)

    with pytest.raises(Killed):
        evaluate(DiesLater(), tasks, Decoding(), 1, {}, out=out)
    assert not (out / "summary.json").exists()
    tasks[0][0].grade_all = None  # pyright: ignore[reportAttributeAccessIssue]
    generator = AnsweringGenerator()
    summaries, predictions = evaluate(generator, tasks, Decoding(), 1, {}, out=out)
    assert len(generator.seen) == 1
    assert [(row["task"], row["accuracy"]) for row in summaries] == [
        ("addition", 1.0),
        ("exact_match", 1.0),
    ]
    assert [row["correct"] for row in predictions] == [[True]] * 3
    assert {file.name for file in out.iterdir()} == {
        "predictions.jsonl",
        "settings.json",
        "summary.json",
    }


def test_a_skipped_task_is_tried_again(data, monkeypatch):
    """Claim: the same command runs it once its scorer is there, keeps what is done, and asks
    nothing while it is missing; also where a kill left half of that."""
    (data / "exact_match.jsonl").write_text('{"question": "1+1=", "answer": "#2"}\n')
    tasks, out = load_tasks(["exact_match", "addition"], data, None), data / "out"
    monkeypatch.setattr(tasks[1][0], "missing", lambda _: "install it")
    summaries, _ = evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {}, out=out)
    assert summaries[1]["skipped"] == "install it"
    generator = AnsweringGenerator()
    assert evaluate(generator, tasks, Decoding(), 1, {}, out=out) == (summaries, [])
    assert not generator.seen
    monkeypatch.undo()
    with pytest.raises(Killed):
        evaluate(DyingGenerator(), tasks, Decoding(), 1, {}, out=out)
    assert not (out / "summary.json").exists()
    again, predictions = evaluate(generator, tasks, Decoding(), 1, {}, out=out)
    assert [len(samples) for _, samples in generator.seen] == [1]  # the other one was kept
    assert again[0] == summaries[0]
    assert [(row["task"], row["accuracy"]) for row in again[1:]] == [("addition", 1.0)]
    assert [row["task"] for row in predictions] == ["exact_match", "addition", "addition"]
    assert evaluate(generator, tasks, Decoding(), 1, {}, out=out) == (again, [])


@pytest.mark.parametrize("killed_in", ["_rewrite", "publish"])
def test_seconds_add_up_wherever_the_kill_fell(data, monkeypatch, killed_in):
    """Claim: a kill while a graded task is written down loses none of its time."""

    def die(*_: object) -> None:
        raise Killed

    tasks, out = load_tasks(["addition"], data, None), data / "out"
    now = iter(range(0, 10**6, 100))
    clock = types.SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("evaluation.generation.task_run.time", clock)
    monkeypatch.setattr(Predictions, killed_in, die)
    with pytest.raises(Killed):
        evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {}, out=out)
    monkeypatch.undo()
    [row], _ = evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {}, out=out)
    assert row["accuracy"] == 1.0 and row["seconds"] >= 300


def test_other_settings_and_other_data_are_refused(data):
    """Claim: the message names what differs; another layout may go on."""
    tasks, out = load_tasks(["addition"], data, None), data / "out"
    evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {"tp": 1}, out=out)
    other = Decoding(max_new_tokens=7, seed=1)
    with pytest.raises(InputError, match="differs in max_new_tokens, seed; choose another"):
        evaluate(AnsweringGenerator(), tasks, other, 1, {"tp": 1}, out=out)
    evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {"tp": 2}, out=out)
    (data / "addition.jsonl").write_text('{"question": "2+3=", "answer": "6"}\n')
    changed = load_tasks(["addition"], data, None)
    with pytest.raises(InputError, match="differs in data_hash"):
        evaluate(AnsweringGenerator(), changed, Decoding(), 1, {"tp": 1}, out=out)
    (data / "foreign").mkdir()
    (data / "foreign" / "notes.txt").touch()
    with pytest.raises(InputError, match="exists and is not empty; choose another name"):
        evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {}, out=data / "foreign")


def test_a_line_that_is_no_prediction_is_named(data):
    tasks, out = load_tasks(["addition"], data, None), data / "out"
    with pytest.raises(Killed):
        evaluate(DyingGenerator(), tasks, Decoding(), 1, {}, out=out)
    with (out / "predictions.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=r"predictions\.jsonl: line 2: not a prediction"):
        evaluate(AnsweringGenerator(), tasks, Decoding(), 1, {}, out=out)
