"""A run directory says what made it, and its page in the tracker goes on over a resume."""

import gzip
import json
from pathlib import Path

from tests import training_run
from tests.conftest import TinyModels
from tests.forking import ForkServer


def test_two_starts_of_one_run(fork_server: ForkServer, models: TinyModels, tmp_path: Path):
    """Claim: the second start adds a record, keeps the tracker's id, and the id is in every
    checkpoint; W&B got every step and the nested metrics; the profile asked for is there."""
    model, out = models.hf("student", tied=True, layers=2), tmp_path / "run"
    prompts = training_run.write_prompts(tmp_path / "prompts.jsonl")
    keys = ["logging.wandb=offline", "checkpoint.every=2", "profile.steps=[2,2]"]
    arguments = training_run.overrides(model, prompts, out, "train.steps=2", *keys)
    done = fork_server.run("megatron_opdlm.train", *arguments)
    assert done.returncode == 0, done.stderr
    run_id = (out / "wandb/run_id").read_text().strip()
    # Nothing is left to do, but it is a start all the same.
    done = fork_server.run("megatron_opdlm.train", *arguments)
    assert done.returncode == 0, done.stderr
    assert (out / "wandb/run_id").read_text().strip() == run_id
    state = json.loads((out / "checkpoints/step_0000002/state.json").read_text())
    assert state["tracker_run_id"] == run_id
    starts = json.loads((out / "environment.json").read_text())
    assert [start["world_size"] for start in starts] == [1, 1]
    assert "logging.wandb=offline" in starts[0]["command"]
    assert starts[0]["packages"]["torch"] and starts[0]["hardware"].startswith("no CUDA")
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert b"kl_by_masked_fraction/" in files[0].read_bytes()
    (profile,) = (out / "profile").iterdir()
    assert profile.name == "torch_steps_2-2_rank_0"
    trace = gzip.decompress((profile / "trace.json.gz").read_bytes())
    for phase in (b"rollout", b"states", b"teacher", b"update"):
        assert b'"name": "%s"' % phase in trace
