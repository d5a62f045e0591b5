"""Paths and names as command lines give them: a home is expanded wherever it stands, and neither
holds a line break."""

from pathlib import Path

import pytest

from checkpoint_tools import export_hf
from evaluation import sweep
from evaluation.reporting.results import read_results
from megatron_opdlm import written_values
from megatron_opdlm.config import load_config, path_override
from megatron_opdlm.errors import Arguments, InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_named_path(home, tmp_path):
    """Claim: the home is expanded behind the name, too; a path that is there may hold a =."""
    (tmp_path / "a=b").mkdir()
    named = written_values.named_path
    assert named("x=~/m") == ("x", f"{home}/m")
    assert named("~/m") == ("", f"{home}/m")
    assert named("x=runs/lr=1") == ("x", "runs/lr=1")
    assert named(f"{tmp_path}/a=b") == ("", f"{tmp_path}/a=b")
    for wrong in ("x\ny=m", "x=m\n", "a\rb"):
        with pytest.raises(ValueError, match="line break"):
            named(wrong)


def test_commands_that_take_named_paths(home):
    """Claim: sweep and report look in the home, and refuse a name over two lines in one line."""
    for read in (sweep.models_by_name, read_results):
        with pytest.raises(InputError, match=f"{home}/nowhere"):
            read(["x=~/nowhere"])
        with pytest.raises(InputError, match="line break"):
            read(["x\ny=m"])


EXPORT = ["--checkpoint", "nowhere", "--format", "sdar", "--out"]


def test_paths_and_names_have_one_line(tmp_path, monkeypatch):
    """Claim: in keys that are paths and in flags; other text keys keep theirs."""
    with pytest.raises(InputError, match="line break"):
        load_config(None, ["train.out=a\nb"])
    assert load_config(None, ["logging.wandb_project=a\nb"]).logging.wandb_project == "a\nb"
    monkeypatch.setattr("sys.argv", ["export", "--base-model", "a\nb", *EXPORT, f"{tmp_path}/out"])
    with pytest.raises(InputError, match=r"--base-model 'a\\nb' holds a line break"):
        export_hf.main()
    parser = Arguments(description=None)
    parser.add_argument("--out", type=Path)
    with pytest.raises(InputError, match="line break"):
        parser.parse_args(["--out", "a\nb"])


@pytest.mark.parametrize("name", ["${train.seed}", "\\${x}", "a\\${x}", "a b", "#1", "[x]", "'q'"])
def test_a_path_that_a_launcher_hands_on_is_read_as_it_is(name):
    """Claim: whatever it holds, also what would be a reference to another key."""
    path = Path("/runs") / name
    assert load_config(None, [path_override("train.out", path)]).train.out == str(path)
