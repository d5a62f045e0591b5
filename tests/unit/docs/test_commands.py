"""Commands in the pages are commands: each is read by its own parser, and those that need no more
than the quickstart leaves are run.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import opdlm
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import Arguments, InputError

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {module: name for name, (module, _) in opdlm.COMMANDS.items()}
QUICKSTART = "runs/quickstart"
# What a synopsis writes in capitals, where any word would not do.
STANDS_FOR = {"FORMAT": "sdar", "NATS": "1", "RECIPE": "configs/opdlm_8b.yaml"}
KEY = re.compile(r"^(?:[a-z_]+\.[a-z_]+=(?:\[.*?\]|\S*)\s*)+")


def blocks(page: Path) -> Iterator[list[str]]:
    """The code of a page: fenced, or indented after an empty line; each line of a shell whole."""
    code: list[str] = []
    fenced, after_empty = False, True
    for line in [*page.read_text().splitlines(), "", "end"]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (code or after_empty)):
            code.append(line if fenced else line[4:])
        elif code and line:
            yield re.sub(r"\\\n\s*", "", "\n".join(code)).splitlines()
            code = []
        after_empty = not line
    assert not fenced, f"{page.name}: a fence is not closed"


def plain(line: str) -> str:
    """A line without its comment; of a synopsis what is optional is given, of ``a|b`` the first."""
    line = re.split(r"(?:^|\s{2,}|\s)#\s", line)[0]
    # [decoding flags]
    line = re.sub(r"(?<!=)\[(?!--)[a-z][^\]=,]*\]|(?<!\S)\.\.\.(?!\S)", "", line)
    line = re.sub(r"\[(--[^\]]*|[A-Z=]+ \.\.\.|[A-Z]+=[A-Z]+[^\]]*)\]", r"\1", line)
    line = re.sub(r"(?<!\S)\.\.\.(?!\S)", "", line)
    return re.sub(r"(?<=[\w-])\|[\w|-]+", "", line)


def project_command(line: str) -> list[str] | None:
    """``[name, argument, ...]`` of the project's command in a line of shell; None: another's."""
    last = plain(line).split("| ")[-1].strip()
    starts = r"(?:[A-Z_]+=\S+ )*(?:opdlm |torchrun |launch/\S+\.sh|\S*python -m|echo )"
    if not re.match(starts, last):
        return None
    words = [STANDS_FOR.get(word, word) for word in shlex.split(last)]
    if words[0] == "launch/pipeline.sh":
        return ["pipeline", *words[1:]]
    for place in range(len(words) - 1):
        word, following = words[place], words[place + 1]
        if word == "opdlm" and following in [*opdlm.COMMANDS, "--help"]:
            return words[place + 1 :]
        if following in MODULES and (word == "-m" or words[place - 1] == "--ranks"):
            return [MODULES[following], *words[place + 2 :]]
    return None


def written() -> list[tuple[str, str, list[str]]]:
    """(page, line, command) of every command of the project in the pages."""
    found = []
    for page in PAGES:
        for code in blocks(page):
            for line in code:
                command = project_command(line)
                if command is not None:
                    found.append((page.name, line, command))
    return found


class Parsed(BaseException):
    """A command line was understood."""


@pytest.fixture
def parser_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where they have read their command line, and the configuration that it names."""

    def parse(self: Arguments, arguments: Any = None, namespace: Any = None) -> Any:
        found = original(self, arguments, namespace)
        overrides = getattr(found, "overrides", None)
        if overrides:
            load_config(getattr(found, "config", None), overrides)
        raise Parsed

    original = Arguments.parse_intermixed_args
    monkeypatch.setattr(Arguments, "parse_args", parse)
    monkeypatch.setattr(Arguments, "parse_intermixed_args", parse)


def test_every_command_is_understood(parser_only: None, monkeypatch: pytest.MonkeyPatch):
    """Claim: each command in a page has the flags, types and keys of its module's own parser; where
    it names a configuration of this repository, that is read with the keys given."""
    monkeypatch.chdir(ROOT)
    commands, wrong = written(), []
    for page, line, command in commands:
        monkeypatch.setattr(sys, "argv", ["opdlm", *command])
        try:
            opdlm._run()
        except Parsed:
            continue
        except SystemExit as end:
            if end.code == 0:  # --help
                continue
            wrong.append(f"{page}: {line}")
        except InputError as error:
            wrong.append(f"{page}: {line}: {error}")
    assert len(commands) > 40 and not wrong, "\n".join(wrong)
    assert len({command[0] for _, _, command in commands}) > 12


def test_every_key_is_one():
    """Claim: what a page sets is a key of the configuration, with a value that it can have."""
    wrong, asked = [], 0
    for page in PAGES:
        for code in blocks(page):
            keys = [found.group().strip() for line in code if (found := KEY.match(line))]
            overrides = [key for text in keys for key in re.findall(r"\S+=(?:\[.*?\]|\S*)", text)]
            asked += len(overrides)
            try:
                load_config(None, overrides)
            except InputError as error:
                wrong.append(f"{page.name}: {error}")
    assert asked > 20 and not wrong, "\n".join(wrong)


def runnable() -> list[tuple[str, str]]:
    """Commands that read nothing but the repository, what the quickstart leaves, and what such
    commands have written before.
    """
    found, made = [], [QUICKSTART]
    for page, line, command in written():
        paths = re.findall(r"(?<![\w/.])(?:runs|checkpoints|data|models)/[\w./-]+", line)
        alone = command[0] == "doctor" and "torchrun" not in line and not paths
        inputs = [path for path in paths if f"train.out={path}" not in line]
        if alone or (inputs and all(path.startswith(tuple(made)) for path in inputs)):
            made += re.findall(r"train.out=(\S+)", line)
            found.append((page, plain(line).strip()))
    return found


def test_which_commands_are_run():
    """Claim: the rule finds the pages' examples on the quickstart's model."""
    lines = [line for _, line in runnable()]
    for begin in ("opdlm doctor", "opdlm report runs/quickstart/run", "torchrun --nproc-"):
        assert any(line.startswith(begin) for line in lines), begin
    assert any("| opdlm chat runs/quickstart/student" in line for line in lines)


@pytest.mark.slow
def test_commands_run_on_what_the_quickstart_leaves(tmp_path: Path):
    """Claim: README's first command, then every command of the pages that needs no more than it
    leaves, ends with code 0 in an empty directory."""
    for name in ("configs", "docs", "evaluation"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "opdlm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m launch.opdlm "$@"\n')
    (binaries / "opdlm").chmod(0o755)
    environment = {
        "PATH": f"{binaries}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
    }
    for line in [f"opdlm quickstart --out {QUICKSTART}", *(line for _, line in runnable())]:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=3000,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
