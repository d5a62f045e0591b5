"""Law 7: killed anywhere and started again by the same command, a run gives the same losses and
weights as one that was never killed; at another layout, losses to 1e-5.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import read_manifest
from tests import training_run
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.distributed.layouts import LAYOUTS
from tests.distributed.layouts import overrides as layout_overrides
from tests.distributed.workers import WorkerGroups
from tests.end_to_end import killed
from tests.end_to_end.killed import Kill, KillWithin
from tests.recorded import distance
from tests.training_run import STEPS, metrics

pytestmark = pytest.mark.distributed


def weights(run: Path, step: int = STEPS) -> jobs.Arrays:
    return jobs.model_weights(run / "checkpoints" / f"step_{step:07d}")


# One run, killed eleven times. Each start gets as far as its kill; calls count from that start.
CHECKPOINT = "megatron_opdlm.checkpoint"
POINTER = "megatron_opdlm.storage.step_directories:write_text"
KILLS: list[Kill | KillWithin] = [
    # before its configuration is recorded, and before there is any checkpoint
    Kill(function="os:replace", call=1),
    Kill(function="megatron_opdlm.run.session:generate_over_copies", call=2),
    # step 2: weights without manifest; complete but not yet published; published but not yet named
    Kill(function=f"{CHECKPOINT}:write_manifest", call=1),
    Kill(function=f"{CHECKPOINT}:publish", call=1),
    Kill(function=POINTER, call=1),
    # after step 2's checkpoint: in the middle of step 3's line, between step 3's updates
    Kill(function="megatron_opdlm.metrics:append_jsonl", call=4, moment="half way"),
    Kill(function="megatron_opdlm.update:update", call=2),
    # step 4: line written, not saved; saved and named, the old one not yet removed
    Kill(function=f"{CHECKPOINT}:Checkpoints.save", call=1),
    Kill(function=POINTER, call=1, moment="after"),
    # step 6, somewhere in its save; steps 7 and 8, anywhere
    KillWithin(function=f"{CHECKPOINT}:_save", call=1, seconds=1.0, seed=1),
    KillWithin(
        function="megatron_opdlm.run.session:generate_over_copies", call=1, seconds=0.4, seed=2
    ),
]


def test_killed_again_and_again(
    forks: WorkerGroups, plain: Path, model: Path, prompts: Path, tmp_path: Path
):
    """Claim: whatever a SIGKILL interrupts, the same command goes on; all numbers of all steps and
    every bit of the final weights are those of the undisturbed run, and nothing half-written is
    left."""
    out = tmp_path / "run"
    # Saves in the background are killed in tests/faults/test_kills.py.
    keys = ["checkpoint.keep=1", "checkpoint.async_save=false"]
    command = training_run.overrides(model, prompts, out, *keys)
    steps_done = 0
    for kill in KILLS:
        (ended,) = forks(1).run(killed.run, overrides=command, kill=kill, timeout=150)
        quicker = isinstance(kill, KillWithin) and ended["code"] == 0  # than the kill
        assert ended["code"] == -9 or quicker, (kill, ended)
        latest = out / "checkpoints" / "latest"
        if latest.exists():  # it never names anything but a complete checkpoint, and never an older
            manifest = read_manifest(latest.parent / latest.read_text().strip())
            assert manifest.step is not None and manifest.step >= steps_done
            steps_done = manifest.step
    assert steps_done > 0, "no kill came after a checkpoint"
    (ended,) = forks(1).run(killed.run, overrides=command, kill=None, timeout=150)
    assert ended["code"] == 0, ended
    assert f"resuming after step {steps_done}" in ended["log"]

    assert metrics(out) == metrics(plain)
    expected, found = weights(plain), weights(out)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    (left,) = (out / "checkpoints").glob("*step_*")
    assert left.name == f"step_{STEPS:07d}"
    assert [file.name for file in out.rglob("*tmp*")] == []


def cut_back(run: Path, out: Path, step: int) -> Path:
    """A copy of a run that got no further than a checkpoint."""
    shutil.copytree(run, out)
    for checkpoint in (out / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (out / "checkpoints" / "latest").write_text(f"step_{step:07d}\n")
    return out


APPROXIMATE = ("loss", "kl", "grad_norm")
OF_THE_LAYOUT = ("cumulative_flops", "kl_by_masked_fraction", "kl_by_block_position")


def assert_same_steps(found: list[dict], expected: list[dict]) -> None:
    """Losses to 1e-5, everything that is counted exactly."""
    training_run.assert_steps(found)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key in APPROXIMATE:
                assert ours[key] == pytest.approx(value, rel=1e-5), (ours["step"], key)
            elif key not in OF_THE_LAYOUT:
                assert ours[key] == value, (ours["step"], key)


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2", "tp2-pp2-sp", "cp2", "tp2-cp2-sp"])
def test_resumed_at_another_layout(
    ranks: WorkerGroups, plain: Path, model: Path, prompts: Path, tmp_path: Path, name: str
):
    """Claim: a one-rank run resumed on a layout, and what that layout saved resumed on one rank,
    report the undisturbed run's steps."""
    number, layout = LAYOUTS[name]
    out = cut_back(plain, tmp_path / "run", 4)
    command = training_run.overrides(model, prompts, out)
    ranks(number).run(jobs.train_run, overrides=[*command, *layout_overrides(layout)], timeout=120)
    assert_same_steps(metrics(out), metrics(plain))
    back = cut_back(out, tmp_path / "back", 6)
    jobs.train_run(training_run.overrides(model, prompts, back))
    assert_same_steps(metrics(back), metrics(plain))
    expected, found, start = weights(plain), weights(back), weights(plain, 2)
    assert distance(found, expected) < 1e-3 * distance(expected, start)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def test_a_finished_run_stays_as_it_is(plain: Path, model: Path, prompts: Path, tmp_path: Path):
    """Claim: the same command once more does nothing."""
    out = cut_back(plain, tmp_path / "run", STEPS)
    before = contents(out / "checkpoints") | {"": (out / "metrics.jsonl").read_bytes()}
    jobs.train_run(training_run.overrides(model, prompts, out))
    assert before == contents(out / "checkpoints") | {"": (out / "metrics.jsonl").read_bytes()}


def test_another_configuration_is_refused(plain: Path, model: Path, prompts: Path, tmp_path: Path):
    """Claim: the error names every key that decides what is computed and differs; keys that only
    decide where and how fast are free to change."""
    out = cut_back(plain, tmp_path / "run", 4)
    before = contents(out)
    changed = ["optimizer.lr=1e-4", "optimizer.min_lr=1e-5", "rollout.block_size=8"]
    free = ["update.tokens_per_microbatch=64", "rollout.slots=3", "checkpoint.every=1"]
    with pytest.raises(InputError) as error:
        jobs.train_run(training_run.overrides(model, prompts, out, *changed, *free))
    message = str(error.value)
    assert all(change.partition("=")[0] in message for change in changed)
    assert not any(change.partition("=")[0] in message for change in free)
    assert contents(out) == before


def test_a_longer_run(model: Path, prompts: Path, tmp_path: Path):
    """Claim: a run that is ended early, goes on to the end of its plan and then for more steps has
    the numbers of one that was not: the schedules run over ``train.steps``, wherever
    ``train.stop_after`` is."""
    keys, longer = ["train.steps=5", "checkpoint.every=9"], f"train.stop_after={STEPS}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    jobs.train_run(training_run.overrides(model, prompts, whole, *keys))
    command = training_run.overrides(model, prompts, parts, *keys)
    jobs.train_run([*command, "train.stop_after=3"])
    assert metrics(parts) == metrics(whole)[:3]
    jobs.train_run(command)
    assert metrics(parts) == metrics(whole)
    with pytest.raises(InputError, match=rf"add {longer}"):
        jobs.train_run([*command, f"train.steps={STEPS}"])
    jobs.train_run([*command, longer])
    assert metrics(parts)[:5] == metrics(whole) and len(metrics(parts)) == STEPS
    assert metrics(parts)[-1]["lr"] == 2e-4  # optimizer.min_lr, from the end of the plan on


def test_other_weights_of_the_teacher_are_refused(
    models: TinyModels, model: Path, prompts: Path, tmp_path: Path
):
    """Claim: a run does not go on with another teacher under the same path, nor with another model
    that it began from; nothing is changed."""
    teacher = shutil.copytree(models.hf("teacher", tied=True, layers=2), tmp_path / "teacher")
    keys = [f"teacher.path={teacher}", "train.steps=1"]
    command = training_run.overrides(model, prompts, tmp_path / "run", *keys)
    jobs.train_run(command)
    shutil.copyfile(model / "model.safetensors", teacher / "model.safetensors")
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"teacher\.path=.* has changed since"):
        jobs.train_run(command)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("pointer", ["missing", "a directory"])
def test_without_its_pointer(
    plain: Path,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    pointer: str,
    capsys: pytest.CaptureFixture[str],
):
    """Claim: a run whose ``latest`` is lost goes on from its newest checkpoint and says so, to the
    undisturbed run's numbers, and never begins again over what it has; where something else has
    the name, it is refused and nothing is changed."""
    out = cut_back(plain, tmp_path / "run", 6)
    (out / "checkpoints" / "latest").unlink()
    command = training_run.overrides(model, prompts, out)
    if pointer == "a directory":
        (out / "checkpoints" / "latest").mkdir()
        before = contents(out)
        with pytest.raises(InputError, match=r"latest is no file"):
            jobs.train_run(command)
        assert contents(out) == before
        return
    jobs.train_run(command)
    assert "latest is missing; going on from step_0000006" in capsys.readouterr().err
    assert metrics(out) == metrics(plain)


@pytest.mark.parametrize(
    "damage", ["truncated", "missing file", "no manifest", "missing directory"]
)
def test_a_checkpoint_cut_short_is_refused(
    plain: Path, model: Path, prompts: Path, tmp_path: Path, damage: str
):
    """Claim: a damaged checkpoint is neither resumed from nor silently passed over, and can be no
    model.path; the run directory stays untouched."""
    out = cut_back(plain, tmp_path / "run", 4)
    checkpoint = out / "checkpoints" / "step_0000004"
    largest = max((checkpoint / "weights").iterdir(), key=lambda f: f.stat().st_size)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[:-7])
    elif damage == "missing file":
        largest.unlink()
    elif damage == "no manifest":
        (checkpoint / "manifest.json").unlink()
    else:
        shutil.rmtree(checkpoint)
    before = contents(out)
    with pytest.raises(InputError, match="step_0000004"):
        jobs.train_run(training_run.overrides(model, prompts, out))
    assert contents(out) == before
    with pytest.raises(InputError, match=r"model\.path|step_0000004"):
        jobs.train_run(training_run.overrides(checkpoint, prompts, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
