"""Runs a command as its user would and says how it refused."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_opdlm.errors import command

COMMANDS = {
    "import_hf": "checkpoint_tools.import_hf",
    "export_hf": "checkpoint_tools.export_hf",
    "verify": "checkpoint_tools.verify",
    "serve_check": "checkpoint_tools.serve_check",
    "inspect": "checkpoint_tools.inspect",
    "train": "megatron_opdlm.train",
    "replay": "megatron_opdlm.replay",
    "prepare_data": "megatron_opdlm.prepare_data",
    "sample": "evaluation.sample",
    "run": "evaluation.run",
    "score": "evaluation.score",
    "report": "evaluation.report",
    "sweep": "evaluation.sweep",
    "recipe": "evaluation.recipe",
    "download": "evaluation.download",
    "quickstart": "launch.quickstart.run",
    "pipeline": "launch.pipeline",
}

Refused = Callable[..., None]


def everything_under(directory: Path) -> dict[str, int]:
    """Every path under a directory with its size, links not followed."""
    return {
        str(path.relative_to(directory)): path.lstat().st_size
        for path in sorted(directory.rglob("*"))
    }


def assert_one_line(code: int, stderr: str, expected: int, patterns: tuple[str, ...]) -> None:
    """The exit code, and stderr that is one ``error:`` line with every pattern and a remedy."""
    assert "Traceback" not in stderr, stderr
    assert code == expected, f"exit code {code}: {stderr}"
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: "), line
    for pattern in patterns:
        assert re.search(pattern, line), f"{pattern!r} is not in {line!r}"
    assert len(line) < 1000, line


class Runner:
    """``runner("import_hf", "--hf", path, ...)``: exit code and stderr of a command, run in this
    process (an interpreter of its own costs seconds of imports).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: object) -> tuple[int, str]:
        main = importlib.import_module(COMMANDS[name]).main
        self._monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command(main)
        assert isinstance(end.value.code, int)
        return end.value.code, self._capsys.readouterr().err

    def refuses(
        self,
        directory: Path,
        name: str,
        *arguments: object,
        patterns: tuple[str, ...],
        code: int = 2,
    ) -> None:
        """The command refuses in one line and leaves ``directory`` as it was."""
        before = everything_under(directory)
        found, stderr = self(name, *arguments)
        assert_one_line(found, stderr, code, patterns)
        assert everything_under(directory) == before
