"""The quickstart's report: only measured values, in the contract's keys; pictures are written."""

import json
import math

import pytest

from evaluation.reporting.summary import SummaryRow
from launch.quickstart.report import checks, report
from launch.quickstart.results import read_results, report_json
from megatron_opdlm.errors import InputError

STEPS, TOKENS_PER_STEP = 40, 2500


def summary(accuracy, step, forward, settings):
    row = SummaryRow(
        task="addition",
        n=770,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / 769),
        tokens_per_denoising_step=step,
        tokens_per_forward=forward,
        mean_response_tokens=21.5,
        seconds=2.0,
        settings={"mode": "diffusion", "logit_shift": False, "threshold": 0.9, **settings},
    )
    return [row.as_dict()]


def static(steps):
    return {"remasking": "low_confidence_static", "denoising_steps": steps}


def dynamic(threshold):
    return {"remasking": "low_confidence_dynamic", "denoising_steps": 4, "threshold": threshold}


EVALUATIONS = {
    "teacher": summary(0.98, None, 1.0, {"mode": "ar"}),
    "initial": summary(0.0, 0.93, 0.87, static(4)),
    "curve_step_0000010": summary(0.21, 0.93, 0.87, static(4)),
    "curve_step_0000020": summary(0.74, 0.93, 0.87, static(4)),
    "static_1": summary(0.97, 0.93, 0.87, static(4)),
    "static_2": summary(0.96, 1.85, 1.70, static(2)),
    "static_4": summary(0.91, 3.44, 3.02, static(1)),
    "dynamic_0.8": summary(0.965, 3.4, 2.9, dynamic(0.8)),
    "dynamic_0.9": summary(0.968, 3.1, 2.7, dynamic(0.9)),
}


@pytest.fixture
def finished(tmp_path):
    """A quickstart directory as the stages leave it, with a loss that falls."""
    (tmp_path / "run").mkdir()
    rows = [
        {
            "step": step,
            "loss": 2 * math.exp(-step / 12),
            "kl": 1.9 * math.exp(-step / 12),
            "cumulative_trained_tokens": step * TOKENS_PER_STEP,
            "kl_by_masked_fraction": {
                f"{share:.2f}": 2 * share * math.exp(-step / 12)
                for share in (0.25, 0.5, 0.75, 1.0)
                if step > 1 or share < 1
            },
        }
        for step in range(1, STEPS + 1)
    ]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in EVALUATIONS.items():
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "summary.json").write_text(json.dumps(rows))
    record = {
        "seed": 7,
        "layout": "dp2",
        "teacher": "toy",
        "block_size": 4,
        "task": "addition",
        "evaluated": list(EVALUATIONS),
        "stopped_after": "step_0000010",
        "finished_at": "step_0000040",
        "seconds": {"teacher": 40.04, "train": 120.0, "total": 200.0},
    }
    (tmp_path / "quickstart.json").write_text(json.dumps(record))
    return tmp_path


def test_report_json_has_the_contracts_keys_and_the_measured_values(finished):
    """Every value is one that a stage wrote."""
    assert report_json(read_results(finished)) == {
        "problems": 770,
        "teacher_accuracy": 0.98,
        "initial_student_accuracy": 0.0,
        "student_accuracy": 0.97,
        "static": {"1": 0.97, "2": 0.96, "4": 0.91},
        "dynamic": {
            "0.8": {"accuracy": 0.965, "tokens_per_denoising_step": 3.4},
            "0.9": {"accuracy": 0.968, "tokens_per_denoising_step": 3.1},
        },
        "trained_tokens": STEPS * TOKENS_PER_STEP,
        "seconds": {"teacher": 40.0, "train": 120.0, "total": 200.0},
        "seed": 7,
        "logit_shift": False,
        "resumed": True,
    }


def test_curve_goes_from_the_untrained_to_the_trained_student(finished):
    """The tokens of a checkpoint are those of its step's metrics row."""
    assert read_results(finished).curve() == [
        (0, 0.0),
        (10 * TOKENS_PER_STEP, 0.21),
        (20 * TOKENS_PER_STEP, 0.74),
        (40 * TOKENS_PER_STEP, 0.97),
    ]


def test_report_writes_page_numbers_and_pictures(finished):
    """The three pictures are PNG files that the page shows; nothing temporary stays."""
    text = report(finished)
    page = (finished / "report.md").read_text()
    assert "untrained student" in text
    assert json.loads((finished / "report.json").read_text())["problems"] == 770
    for name in ("training.png", "accuracy_over_tokens.png", "accuracy_over_speed.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page
    assert not list(finished.glob("*.tmp"))


def test_what_was_not_reached_is_said(finished):
    """A run below the bars says which ones; a run that was never stopped is not called resumed."""
    numbers = report_json(read_results(finished))
    assert all(met for _, met in checks(numbers))
    worse = numbers | {"teacher_accuracy": 0.94, "student_accuracy": 0.5, "resumed": False}
    assert [met for _, met in checks(worse)] == [True, False, True, False, True, True, False]


def test_an_unfinished_or_repeated_run_is_refused(finished):
    """No report without its data: a missing record, or metrics whose steps go back."""
    metrics = finished / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3}\n')
    with pytest.raises(InputError, match="steps repeat or go back"):
        read_results(finished)
    (finished / "quickstart.json").unlink()
    with pytest.raises(InputError, match="no finished quickstart"):
        read_results(finished)
