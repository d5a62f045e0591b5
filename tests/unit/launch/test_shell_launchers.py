"""What the shell launchers hand on reaches the program as it was given: blanks, quotes, homes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHOW = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(place: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """The words that a copy of the script starts its program with."""
    (place / "launch").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "launch" / script, place / "launch")
    program(place / ".venv" / "bin" / "python", SHOW)
    program(place / "bin" / "srun", SHOW)
    program(place / "bin" / "scontrol", "#!/usr/bin/env bash\necho node1\n")
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", place / "launch" / script, *arguments],
        env={"PATH": path, "HOME": str(place), **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.splitlines()


MODULE = ["megatron_opdlm.train", "train.out=runs/a b #2", "train.out=$(x) 'q' \"r\" *"]


@pytest.mark.parametrize("script", ["one_node.sh", "many_nodes.sh"])
def test_torchrun(tmp_path: Path, script: str):
    nodes = ["--nodes", "2", "--rendezvous", "h:1"] if script == "many_nodes.sh" else []
    place = tmp_path / "a place"
    words = run(place, script, *nodes, "--ranks", "1", *MODULE, OPDLM_LOGS="~/my logs")
    assert words[-len(MODULE) :] == MODULE
    assert words[words.index("--log-dir") + 1] == f"{place}/my logs"


def test_slurm(tmp_path: Path):
    place = tmp_path / "a place"
    variables = {"OPDLM_ROOT": str(place), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    variables |= {"OPDLM_LOGS": "~/my logs", "OPDLM_SRUN": "--comment='two words' --exact"}
    words = run(place, "slurm.sbatch", *MODULE, **variables)
    assert words[-len(MODULE) :] == MODULE
    assert {"--comment=two words", "--exact"} <= set(words)
    assert (place / "my logs" / "7").is_dir()
    assert not (place / "~").exists() and not Path("~").exists()
