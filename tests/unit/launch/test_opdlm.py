"""The command ``opdlm``: its sub-commands are the modules' own commands, found by name."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import opdlm
from megatron_opdlm import __version__
from megatron_opdlm.errors import InputError
from tests.unit.launch.run_page.test_page import write_run

ROOT = Path(__file__).parents[3]
SECONDS = 120  # generous: the machine may be loaded
NEXT = "#### next\n"
LIGHT = """
import sys
from launch import opdlm
for name in ["--help", *opdlm.COMMANDS]:
    sys.argv = ["opdlm", name, "--help"]
    try:
        opdlm._run()
    except SystemExit as end:
        assert end.code == 0, name
    print("heavy:", [name for name in ("torch", "transformers", "datasets") if name in sys.modules])
    print("#### next")
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Name -> help; "" is ``opdlm --help``. One process asks all."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    *texts, rest = done.stdout.split(NEXT)
    assert not rest
    return dict(zip(["", *opdlm.COMMANDS], texts, strict=True))


def test_every_help_names_its_command_and_imports_no_torch(helps: dict[str, str]):
    """Claim: ``opdlm --help`` lists every command, ``opdlm NAME --help`` is that command's own help
    under that name, and neither waits for PyTorch."""
    for name, (_, does) in opdlm.COMMANDS.items():
        assert f"  {name:<12} {does}\n" in helps[""]
        assert helps[name].startswith(f"usage: opdlm {name} ")
    heavy = [name for name, text in helps.items() if not text.endswith("heavy: []\n")]
    assert not heavy


def test_pages_use_flags_that_exist(helps: dict[str, str]):
    """Claim: commands in a page or at a recipe's head have flags that the command knows."""
    names = {module: name for name, (module, _) in opdlm.COMMANDS.items()}
    asked, unknown = 0, []
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml")]
    for page in pages:
        text = re.sub(r"\\\n#? *", " ", page.read_text())
        for called, rest in re.findall(r"(?:opdlm |-m |pipeline.sh )([\w.-]+)(.*)", text):
            name = called if called in opdlm.COMMANDS else names.get(called)
            if name is None:
                continue
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.split("[|`]", rest)[0]):
                asked += 1
                unknown += [] if flag in helps[name] else [f"{page.name}: {called} {flag}"]
    assert asked > 20 and not unknown


def test_what_is_no_command_is_refused(monkeypatch: pytest.MonkeyPatch):
    for argv, message in (
        ([], "a command is needed; opdlm --help"),
        (["trian"], "'trian' is no command .did you mean 'train'"),
        (["servecheck", "--hf", "x"], "did you mean 'serve-check'"),
    ):
        monkeypatch.setattr(sys, "argv", ["opdlm", *argv])
        with pytest.raises(InputError, match=message):
            opdlm._run()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["inspect", "tests"], 2, "error: tests has no config.json"),
        (["inspect", "--no-such-flag"], 2, "error: "),
    ],
)
def test_a_command_ends_with_its_own_code(argv: list[str], code: int, said: str):
    done = subprocess.run(
        [sys.executable, "-m", "launch.opdlm", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == code and done.stderr.startswith(said), done.stderr


def test_the_report_of_a_run_is_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Claim: ``opdlm report RUN`` is ``opdlm page RUN``, whose page lies in the run's directory
    unless another place is named; of anything else it is the report of results."""
    run = write_run(tmp_path / "run", steps=2)
    for arguments, place in (
        ([str(run)], run / "page.html"),
        ([f"a={run}", "--out", str(tmp_path / "a.html")], tmp_path / "a.html"),
    ):
        monkeypatch.setattr(sys, "argv", ["opdlm", "report", *arguments])
        opdlm._run()
        assert capsys.readouterr().out == f"page: {place}\n" and place.is_file()
    monkeypatch.setattr(sys, "argv", ["opdlm", "report", str(tmp_path)])
    with pytest.raises(InputError, match=r"summary\.json"):
        opdlm._run()


def test_the_version_stands_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "megatron_opdlm.__version__"
    places = [
        file
        for folder in ("megatron_opdlm", "checkpoint_tools", "evaluation", "launch")
        for file in (ROOT / folder).rglob("*.py")
        if f'"{__version__}"' in file.read_text()
    ]
    assert places == [ROOT / "megatron_opdlm" / "__init__.py"]


def test_the_commands_page_is_the_table():
    """Claim: docs/commands.md has a row for each command, with its module and what it does."""
    page = (ROOT / "docs" / "commands.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `opdlm ")]
    names = {module: name for name, (module, _) in opdlm.COMMANDS.items()}
    assert len(rows) == len(names)
    for module, name in names.items():
        (row,) = [row for row in rows if row.startswith(f"| `opdlm {name}` | `{module}` |")]
        assert opdlm.COMMANDS[name][1] in row
