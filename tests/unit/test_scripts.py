"""Shell scripts and the Dockerfile hold to their linters."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
SCRIPTS = sorted([*REPOSITORY.glob("launch/**/*.sh"), REPOSITORY / "tests/run.sh"])


def lint(*command: str | Path) -> str:
    """What a linter says; empty when it is content."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode == 0) == (not done.stdout), done
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(script: Path):
    assert lint(TOOLS / "shellcheck", script) == ""


def test_shellcheck_finds_something(tmp_path: Path):
    (tmp_path / "x.sh").write_text("#!/bin/sh\nrm $1\n")
    assert "SC2086" in lint(TOOLS / "shellcheck", tmp_path / "x.sh")


def test_dockerfile():
    assert lint(TOOLS / "hadolint", REPOSITORY / "Dockerfile") == ""
