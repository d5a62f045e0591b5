"""Tables, pictures and sweeps over summaries."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from evaluation import report, sweep
from evaluation.reporting import figures
from evaluation.reporting.published import sweeps
from evaluation.reporting.results import Result, read_results
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from tests.unit.evaluation.test_run import AnsweringGenerator


def summary_row(task: str, accuracy: float, **settings: Any) -> dict[str, Any]:
    how = {
        "model": "models/ours",
        "mode": "diffusion",
        "remasking": "low_confidence_static",
        "block_size": 4,
        "denoising_steps": 4,
        "threshold": 0.9,
    }
    return {
        "task": task,
        "n": 30,
        "accuracy": accuracy,
        "stderr": 0.01,
        "tokens_per_denoising_step": settings.pop("speed", 1.0),
        "tokens_per_forward": 0.9,
        "mean_response_tokens": 10.0,
        "seconds": 1.0,
        "settings": how | settings,
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_measured_beside_published(tmp_path: Path):
    """A model of a published name: both figures and their difference. Of two decodings the one with
    a token a pass stands in the table. Other names get a column, thinking ones their own."""
    ours = write(
        tmp_path / "a" / "summary.json",
        summary_row("AIME24", 0.2),
        summary_row("AIME-24", 0.9, remasking="low_confidence_dynamic", speed=2.0),
        summary_row("AIME-24", 0.3, enable_thinking=True),
    )
    other = write(tmp_path / "b" / "summary.json", summary_row("MMLU", 0.5), summary_row("x", 1.0))
    report.write_report([f"OPDLM-4B={ours}", f"mine={other}"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "14.4 / **20.0 ± 1.0** (+5.6)" in text
    assert "11.2 / **30.0 ± 1.0** (+18.8)" in text
    first = text[text.index("## Table 1") : text.index("## Table 2")]
    header = next(line for line in first.splitlines() if line.startswith("| benchmark"))
    assert header.endswith("| mine |") or "| mine |" in header
    assert "| mine | x | 30 | 100.0 ± 1.0 |" in text
    assert "7.6e+07" in first and "2.4e+18" in first


def test_decodings_and_seeds_have_their_columns(tmp_path: Path):
    """Claim: a dynamic result stands in Table 11's dynamic column and not in Table 1; the table
    over seeds shows the deviation over them; a paper's model stands in its own tables only."""
    dynamic = {"remasking": "low_confidence_dynamic", "speed": 2.0}
    seeds = summary_row("GPQA-Diamond", 0.25) | {"k": 8, "std_over_samples": 0.021}
    rows = summary_row("GSM8K", 0.5), summary_row("GSM8K", 0.4, **dynamic), seeds
    file = write(tmp_path / "summary.json", *rows)
    report.write_report([f"OPDLM-4B={file}", f"SFT-4B={file}"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    tables = dict(re.findall(r"## Table (\d+): (.*?)\n(?=## )", text, re.DOTALL))
    assert "| GSM8K | 87.6 / **50.0 ± 1.0** (-37.6) | 86.0 / **40.0 ± 1.0** (-46.0)" in tables["11"]
    assert "40.0" not in tables["1"] and "SFT-4B" not in tables["1"]
    assert "29.1 ± 2.7 / **25.0 ± 2.1** (-4.1)" in tables["9"]
    assert "29.1 / **25.0 ± 1.0** (-4.1)" in tables["1"]


def test_a_skipped_task_is_listed_with_its_reason(tmp_path: Path):
    """Claim: a task whose scorer was missing stands in the report as not graded, never as 0, also
    beside a graded result of the same task under other decoding."""
    skipped = {"n": 0, "accuracy": None, "stderr": None, "skipped": "install livebench"}
    rows = summary_row("LiveBench", 0.4), summary_row("LiveBench", 0.0) | skipped
    file = write(tmp_path / "summary.json", *rows, summary_row("MMLU", 0.0) | skipped)
    report.write_report([f"OPDLM-4B={file}"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| OPDLM-4B | LiveBench | install livebench |" in text
    assert "| OPDLM-4B | MMLU | install livebench |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| LiveBench |")]
    assert "**40.0 ± 1.0**" in line and "**0.0" not in text
    assert report.table([row.row for row in read_results([str(file)])]).count(" - ") >= 2


def test_curves_and_areas(tmp_path: Path):
    """Points at 1 and 2 tokens a step: area 0.8 + 0.7; the picture is a picture."""
    fast = {"remasking": "low_confidence_dynamic", "speed": 2.0}
    path = write(
        tmp_path / "summary.json",
        summary_row("MATH-500", 0.8),
        summary_row("MATH-500", 0.6, **fast),
        summary_row("MATH-500", 0.5, **fast | {"threshold": 0.7, "speed": 3.0}),
    )
    report.write_report([str(path)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| MATH-500 | ours | tokens per step | 2.050 |" in text
    for line in ("dynamic 0.7 | 4 | 50.0 ± 1.0 | 3.00", "static T=4 | 4 | 80.0 ± 1.0 | 1.00"):
        assert line in text
    for name in ("threshold", "block_size", "accuracy_over_speed_math500"):
        assert f"({name}.png)" in text
        assert matplotlib.image.imread(tmp_path / "out" / f"{name}.png").std() > 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "not JSON"), ("{}", "not a list of summary rows"), ('[{"task": 1}]', "not a list")],
)
def test_bad_summaries(tmp_path: Path, text: str, message: str):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_results([str(tmp_path)])


def test_an_empty_directory(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no summary\.json; give the --out"):
        read_results([f"name={tmp_path}"])


def test_sweep_points():
    """Static in each number of passes, dynamic at each threshold, for each block size."""
    points = sweep.sweep_points(
        Decoding(max_new_tokens=9), block_sizes=[4, 8], steps=[1, 4], thresholds=[0.5]
    )
    assert [point.name for point in points] == [
        *("block4-static-1", "block4-static-4", "block4-dynamic-0.5"),
        *("block8-static-1", "block8-static-4", "block8-dynamic-0.5"),
    ]
    assert points[5].decoding == Decoding(
        max_new_tokens=9,
        block_size=8,
        denoising_steps=8,
        remasking="low_confidence_dynamic",
        threshold=0.5,
    )
    [alone] = sweep.sweep_points(Decoding(), block_sizes=[4], steps=[], thresholds=[])
    assert alone.decoding == Decoding()


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a sweep of two models over one addition problem; returns what was generated with."""
    (tmp_path / "addition.jsonl").write_text('{"question": "2+3=", "answer": "5"}\n')
    opened: list[tuple[str, AnsweringGenerator]] = []

    def open_generator(model: Path, loading: Any) -> AnsweringGenerator:
        opened.append((model.name, AnsweringGenerator()))
        return opened[-1][1]

    monkeypatch.setattr(sweep, "open_generator", open_generator)
    for name in ("first", "second"):
        (tmp_path / name).mkdir(exist_ok=True)

    def run(*flags: str) -> list[tuple[str, int]]:
        opened.clear()
        models = [str(tmp_path / "first"), f"other={tmp_path / 'second'}"]
        arguments = ["--models", *models, "--tasks", "addition", "--data", str(tmp_path)]
        arguments += ["--out", str(tmp_path / "out"), *flags]
        monkeypatch.setattr("sys.argv", ["sweep", *arguments])
        sweep.main()
        return [(name, len(generator.seen)) for name, generator in opened]

    return run


def test_a_sweep_runs_each_point_once(swept, tmp_path: Path):
    """Claim: killed and started again it runs what is missing, with the same results; another
    evaluation in its directory is refused."""
    flags = ["--steps", "2", "4", "--thresholds", "0.9"]
    assert swept(*flags) == [("first", 3), ("second", 3)]
    whole = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(whole) == 6 and all(row["accuracy"] == 1.0 for row in whole)
    shutil.rmtree(tmp_path / "out" / "other" / "block4-static-2")
    assert swept(*flags) == [("second", 1)]
    again = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["settings"] for row in again] == [row["settings"] for row in whole]
    assert "addition over the decoding: other" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(InputError, match="holds an evaluation that differs in max_new_tokens"):
        swept(*flags, "--max-new-tokens", "7")


def test_stale_points_are_refused_and_flags_are_those_of_run(swept, tmp_path, monkeypatch):
    """Claim: a model that was trained further, or other data, in the same place ends the sweep
    before any point is run; numbers below 1 are refused; thinking reaches the points."""
    monkeypatch.setattr(sweep, "write_report", lambda *_: None)
    swept("--steps", "2", "4", "--enable-thinking")
    [row, *_] = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert row["settings"]["enable_thinking"] is True
    with pytest.raises(InputError, match="differs in enable_thinking"):
        swept("--steps", "2", "4")
    shutil.rmtree(tmp_path / "out" / "first" / "block4-static-2")
    (tmp_path / "second" / "config.json").write_text("{}")
    opened = "not started"
    with pytest.raises(InputError, match=r"block4-static-2: holds an .* differs in model_hash"):
        opened = swept("--steps", "2", "4", "--enable-thinking")
    (tmp_path / "second" / "config.json").unlink()
    (tmp_path / "addition.jsonl").write_text('{"question": "2+3=", "answer": "6"}\n')
    with pytest.raises(InputError, match="differs in data_hash"):
        opened = swept("--steps", "2", "4", "--enable-thinking")
    assert opened == "not started"
    assert not (tmp_path / "out" / "first" / "block4-static-2").exists()
    with pytest.raises(InputError, match="--limit -1: a number of problems"):
        swept("--limit", "-1")
    with pytest.raises(InputError, match="--samples 0: responses to each problem"):
        swept("--responses-per-prompt", "0")


def test_a_line_of_the_threshold_figure_has_one_block_size():
    """Claim: two block sizes are two lines; one alone has the model's name."""
    rows = [
        summary_row(
            "MATH-500",
            0.5,
            remasking="low_confidence_dynamic",
            threshold=threshold,
            block_size=size,
            model=model,
        )
        for size, model in ((4, "a"), (8, "a"), (4, "b"))
        for threshold in (0.9, 0.8)
    ]
    results = [Result(model=row["settings"]["model"], row=row) for row in rows]
    lines = figures._comparable(sweeps()[0], results)
    assert {
        name: [(r.settings["block_size"], r.settings["threshold"]) for r in group]
        for name, group in lines.items()
    } == {
        "a, blocks of 4": [(4, 0.8), (4, 0.9)],
        "a, blocks of 8": [(8, 0.8), (8, 0.9)],
        "b": [(4, 0.8), (4, 0.9)],
    }


def test_two_models_of_one_name(tmp_path: Path):
    with pytest.raises(InputError, match="two are called x; give NAME=DIR"):
        sweep.models_by_name([f"x={tmp_path}", f"x={tmp_path}"])
