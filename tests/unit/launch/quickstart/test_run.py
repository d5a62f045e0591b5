"""The quickstart's command line and stages: bad input before work, failures that name a stage."""

import subprocess
import sys

import pytest

from launch.quickstart.run import _free_directory, _parser, _settings
from launch.stages import Stages, checkpoints, python, stop
from megatron_opdlm.errors import InputError, RunError


def settings(*argv):
    return _settings(_parser().parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--layout", "pp2"), "--layout pp2: not known; use dp2 or tp2"),
        (("--seed", "-1"), "--seed -1"),
        (("--data", "x.jsonl"), "go with --hf DIR"),
        (("--hf", "absent"), "--hf absent: no such file or directory"),
        (("--hf", ".", "--test", "absent.jsonl"), r"--test absent\.jsonl: no such file"),
        (("oops",), "'oops': not understood"),
        (("train.stesp=3",), "train.steps"),
        (("--config", "absent.yaml"), r"--config absent\.yaml"),
    ],
)
def test_bad_command_lines_are_found_before_any_work(tmp_path, argv, message):
    """One line with the value and a remedy; nothing is written."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        settings("--out", str(out), *argv)
    assert not out.exists()


def test_an_output_directory_with_something_in_it_is_refused(tmp_path):
    """An explicit --out is never mixed with an earlier run."""
    (tmp_path / "report.md").write_text("earlier")
    with pytest.raises(InputError, match="exists and is not empty"):
        settings("--out", str(tmp_path))


def test_without_out_every_run_gets_its_own_directory(tmp_path):
    """The bare command is safe to run twice."""
    wanted = tmp_path / "quickstart"
    assert _free_directory(wanted) == wanted
    wanted.mkdir()
    (tmp_path / "quickstart-2").mkdir()
    assert _free_directory(wanted) == tmp_path / "quickstart-3"


def test_only_complete_checkpoints_count_as_checkpoints(tmp_path):
    """A directory without manifest is a save in progress."""
    for name in ("step_0000010", "step_0000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_0000020").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000009", "step_0000010"]


def test_a_failed_stage_is_named_with_its_own_reason_and_log(tmp_path):
    """The reason is the stage's ``error:`` line, not a traceback."""
    stages = Stages(logs=tmp_path / "logs")
    code = "import sys; print('noise'); print('error: no room', file=sys.stderr); sys.exit(2)"
    with pytest.raises(
        RunError, match=r"stage import ended with code 2: no room; see .*import\.log"
    ):
        stages.run("import", [sys.executable, "-c", code])


def test_a_stage_returns_its_headline_and_its_seconds_add_up(tmp_path, capsys):
    """The last line of output is the headline; the command is shown as a user would type it."""
    stages = Stages(logs=tmp_path / "logs")
    for _ in range(2):
        with stages.stage("export", "e) export"):
            assert stages.run("export", [sys.executable, "-c", "print('a'); print('done\\n')"]) == (
                "done"
            )
    assert list(stages.seconds) == ["export"]
    assert 0 < stages.seconds["export"] < 60
    assert "=== e) export" in capsys.readouterr().out
    assert python("a.b", "--c") == [sys.executable, "-m", "a.b", "--c"]


def test_stopping_a_job_waits_for_its_end():
    """SIGKILL, then the process is gone."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stop(process)
    assert process.returncode == -9
