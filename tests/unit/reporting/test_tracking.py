"""W&B keeps a run's page over a resume; each start of a run says what it ran with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.configuration.learning import LoggingConfig
from megatron_opdlm.errors import InputError
from megatron_opdlm.metrics import MetricsWriter
from megatron_opdlm.reporting.trackers import TrackedRun, open_trackers
from megatron_opdlm.run import provenance

# One start of a run: W&B serves one run a process well, and takes its service down with it.
START = """
import sys
from pathlib import Path
from megatron_opdlm.metrics import MetricsWriter
from megatron_opdlm.configuration.learning import LoggingConfig
from megatron_opdlm.reporting.trackers import TrackedRun, open_trackers
run_dir, first, last, known = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
logging = LoggingConfig(
    tensorboard=False, wandb="offline", wandb_project="p", wandb_entity="some-team",
    wandb_group="some-group", wandb_tags=["some-tag"], **({"wandb_name": "a-name"} if known else {})
)
run = TrackedRun(
    directory=run_dir, start_step=first - 1, logging=logging, settings={"train.seed": 3},
    run_id=(known or [None])[0],
)
trackers = open_trackers(run)
metrics = MetricsWriter(
    run_dir, enabled=True, total_steps=4, start_step=first - 1, trackers=trackers
)
sample = {"prompt": "p", "response_ids": [5], "response_texts": ["some-text"], "committed_at": [1],
          "response_tokens": 1, "finish_reason": "stop", "forwards": 2}
for step in range(first, last + 1):
    metrics.write(step, {"loss": step / 2, "kl_by_masked_fraction": {"0.25": 7.59375 + step}})
    metrics.samples(step, [sample])
metrics.close()
print("id", trackers[0].run_id)
"""


def start(run_dir: Path, first: int, last: int, *known: str) -> str:
    """Steps ``first`` to ``last`` of a run; W&B's id of it."""
    command = [sys.executable, "-c", START, str(run_dir), str(first), str(last), *known]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def run(directory: Path, **keys) -> TrackedRun:
    logging = LoggingConfig(**{"tensorboard": False, **keys})
    return TrackedRun(directory=directory, start_step=0, logging=logging, settings={})


def recorded(run_dir: Path) -> list[bytes]:
    """What W&B wrote, a file for each start."""
    return [file.read_bytes() for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def test_a_resumed_run_goes_on_in_the_same_page(tmp_path: Path):
    run_dir = tmp_path / "some-run"
    first = start(run_dir, 1, 2)
    assert (run_dir / "wandb/run_id").read_text() == first + "\n"
    assert start(run_dir, 3, 4) == first
    (run_dir / "wandb/run_id").unlink()  # moved without it: the checkpoint knows
    assert start(run_dir, 5, 5, first) == first
    one, two, three = recorded(run_dir)
    for file in (one, two, three):
        assert first.encode() in file and b"train.seed" in file
        assert all(word in file for word in (b"some-team", b"some-group", b"some-tag"))
    assert (b"some-run" in two, b"a-name" in two) == (True, False), "the directory's name"
    assert b"a-name" in three
    tables = [file.read_text() for file in run_dir.glob("wandb/offline-run-*/**/*.table.json")]
    assert len(tables) == 5 and all("some-text₁" in json.loads(t)["data"][0][2] for t in tables)
    assert b"kl_by_masked_fraction/0.25" in one
    assert (b"9.59375" in one, b"9.59375" in two) == (True, False)
    assert (b"11.59375" in one, b"11.59375" in two) == (False, True)


def test_no_tracker(tmp_path: Path):
    assert list(open_trackers(run(tmp_path, wandb="none"))) == []
    assert list(tmp_path.iterdir()) == []


def test_online_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(
        InputError, match=r"wandb=online: .*; log in with 'wandb login' .*=offline$"
    ):
        open_trackers(run(tmp_path, wandb="online"))


def test_the_other_ranks_need_no_tracker(tmp_path: Path):
    metrics = MetricsWriter(tmp_path / "run", enabled=False, total_steps=1, start_step=0)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_each_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    how = {"hardware": "no CUDA device", "devices": [], "world_size": 2}
    provenance.record_start(tmp_path, **how)
    monkeypatch.setenv(provenance.REVISION_VARIABLE, "abc123")
    monkeypatch.setattr(provenance, "CODE", tmp_path)
    provenance.record_start(tmp_path, **how)
    first, second = json.loads((tmp_path / provenance.ENVIRONMENT).read_text())
    assert first["packages"]["megatron-core"].startswith("0.16")
    assert (first["world_size"], first["hardware"]) == (2, "no CUDA device")
    assert second["revision"] == {"commit": "abc123", "modified": None}
    assert first["memory_bytes"] > 2**30 and first["cpu_cores"] >= 1


def test_revision_is_the_repository_s(monkeypatch: pytest.MonkeyPatch):
    """Claim: of the code that runs, though an image below it says what that was built of."""
    monkeypatch.setenv(provenance.REVISION_VARIABLE, "abc123")
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        pytest.skip("a copy without its repository")
    found = provenance.revision()
    assert found is not None and len(found["commit"]) == 40
    assert found["commit"] == head(root)


def repository(root: Path) -> str:
    """A git repository of one file; its commit."""
    name = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    (root / "code.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", *name, "-C", str(root), *command], check=True, timeout=60)
    return head(root)


def head(root: Path) -> str:
    """The commit that is checked out, as git names it."""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_a_repository_of_another_user_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Claim: as it is mounted into a container; and changes to it are seen."""
    monkeypatch.setattr(provenance, "CODE", tmp_path)
    commit = repository(tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert provenance.revision() == {"commit": commit, "modified": False}
    (tmp_path / "code.py").write_text("2\n")
    assert provenance.revision() == {"commit": commit, "modified": True}


def test_no_git_no_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Claim: nothing is said of a repository that cannot be asked, not even what an image says; of
    code without a repository, the image's word, if it has one."""
    monkeypatch.setattr(provenance, "CODE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(provenance.REVISION_VARIABLE, "abc123")
    assert provenance.revision() == {"commit": "abc123", "modified": None}
    (tmp_path / ".git").mkdir()
    assert provenance.revision() is None
    (tmp_path / ".git").rmdir()
    monkeypatch.setenv(provenance.REVISION_VARIABLE, "")
    assert provenance.revision() is None


def test_the_image_carries_its_revision():
    dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text()
    assert f"ENV {provenance.REVISION_VARIABLE}=${{REVISION}}" in dockerfile
