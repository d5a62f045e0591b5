"""Long work says how far it is: a bar where somebody watches, else a line now and then."""

import io
import sys

import pytest

from launch import stages
from megatron_opdlm.reporting import progress
from megatron_opdlm.reporting.progress import BYTES, Progress, last_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bytes_are_told_in_gigabytes(monkeypatch: pytest.MonkeyPatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress("export out", 6_000_000_000, show=True, unit=BYTES) as bar:
        bar.advance(count=1_000_000_000)
        now = 60.0
        bar.advance(count=1_000_000_000)
    assert capsys.readouterr().err == "export out: 2.00 of 6.00 GB, 2.0 minutes left\n"


def test_a_terminal_has_a_bar_with_an_estimate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("train", 4, 1, show=True, unit="step") as bar:
        for loss in (0.5, 0.25):
            bar.advance(note=f"loss={loss}")
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("train:  75%") and "3/4 [" in last and "loss=0.25" in last


def test_a_stage_says_on_a_terminal_what_its_log_says(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Claim: the last line of progress in the stage's log, which goes when the stage ends."""
    said = "train: 5 of 10 steps, loss=0.51, 0.3 minutes left"
    assert last_line(f"begin\ntrain: 4 of 10 steps, 0.4 minutes left\n{said}\nnote: x\n") == said
    assert last_line("begin\n") == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(stages, "WATCH_SECONDS", 0.1)
    script = f"import time; print({said!r}, flush=True); time.sleep(0.8); print('done')"
    runner = stages.Stages(logs=tmp_path)
    assert runner.run("train", [sys.executable, "-c", script]) == "done"
    assert f"\r\033[K{said}" in terminal.getvalue() and terminal.getvalue().endswith("\r\033[K")
