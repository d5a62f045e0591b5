"""A run directory is used by the run that made it, and by no other."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_opdlm.config import load_config
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.fingerprint import fingerprint
from megatron_opdlm.run import provenance
from megatron_opdlm.run.run_directory import check_run_directory, prepare_run_directory
from tests.conftest import TinyModels


@pytest.fixture
def keys(models: TinyModels, tmp_path: Path) -> list[str]:
    """Two models and two data files, and a run directory over them that has been started."""
    student, data = models.hf("student", tied=True, layers=2), tmp_path / "data.jsonl"
    paths = {
        "model.path": shutil.copytree(student, tmp_path / "student"),
        "teacher.path": shutil.copytree(models.imported("teacher", tied=True), tmp_path / "t"),
        "data.path": data,
        "mixing.path": tmp_path / "mixing.jsonl",
        "train.out": tmp_path / "run",
    }
    data.write_text('{"prompt": "a"}\n')
    paths["mixing.path"].write_text('{"prompt": "b"}\n')
    keys = [*(f"{key}={path}" for key, path in paths.items()), "train.steps=8"]
    keys += ["mixing.fraction=0.5"]
    config = load_config(None, keys)
    check_run_directory(config)
    prepare_run_directory(config)
    provenance.record_start(tmp_path / "run", hardware="", devices=(), world_size=1)
    check_run_directory(config)
    return keys


def check(keys: list[str], *more: str) -> None:
    check_run_directory(load_config(None, [*keys, *more]))


def test_the_inputs_are_recorded(keys: list[str], tmp_path: Path):
    """Claim: what the run reads is recorded by key, data by all of it, models by fingerprint."""
    record = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert record == {
        "model.path": fingerprint(tmp_path / "student"),
        "teacher.path": fingerprint(tmp_path / "t"),
        "data.path": content_hash(tmp_path / "data.jsonl"),
        "mixing.path": content_hash(tmp_path / "mixing.jsonl"),
    }


@pytest.mark.parametrize("key", ["model.path", "teacher.path", "data.path", "mixing.path"])
def test_another_input_under_the_same_path_is_refused(
    keys: list[str], models: TinyModels, tmp_path: Path, key: str
):
    """Claim: other weights, other data: the run does not go on, before any model is read, and the
    error names the key; of one that is not there its reader says so."""
    path = Path(next(k for k in keys if k.startswith(key)).partition("=")[2])
    if path.is_dir():
        shutil.rmtree(path)
        other = models.hf("teacher" if key == "model.path" else "student", tied=True, layers=2)
        shutil.copytree(other, path)
    else:
        path.write_text('{"prompt": "c"}\n')
    with pytest.raises(InputError, match=rf"^{key}={path} has changed since .*restore it"):
        check(keys)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    check(keys)


def test_a_longer_run_says_what_becomes_of_its_schedules(keys: list[str]):
    """Claim: another number of steps alone is refused with both ways on; with either, or where
    nothing runs over the whole plan, it is taken."""
    with pytest.raises(InputError) as error:
        check(keys, "train.steps=16")
    assert "planned over train.steps=8, this command plans train.steps=16" in str(error.value)
    assert "plan train.steps=8 again and add train.stop_after=16" in str(error.value)
    check(keys, "train.stop_after=16")
    check(keys, "train.steps=16", "train.stop_after=16")
    ended = ["train.stop_after=6"]  # as the general recipes do
    prepare_run_directory(load_config(None, [*keys, *ended]))
    with pytest.raises(InputError, match=r"plan train\.steps=8 again"):
        check(keys, *ended, "train.steps=16")
    check(keys, "train.stop_after=7")
    check(keys)
    with pytest.raises(InputError, match=r"train\.steps=2; for a trial .* train\.stop_after=2;"):
        check(keys, "train.out=new", *ended, "train.steps=2")
    with pytest.raises(InputError, match=r"data\.epochs=2"):
        check(keys, "train.steps=-1", "data.epochs=2")
    check(keys, "data.epochs=2")
    flat = ["optimizer.min_lr=1e-5"]
    prepare_run_directory(load_config(None, [*keys, *flat]))
    check(keys, *flat, "train.steps=16")
    ramp = ["threshold_schedule.enabled=true", "rollout.remasking=low_confidence_dynamic"]
    ramp += ["threshold_schedule.hold_steps=2"]
    prepare_run_directory(load_config(None, [*keys, *flat, *ramp]))
    with pytest.raises(InputError, match="threshold_schedule run over the plan"):
        check(keys, *flat, *ramp, "train.steps=16")


@pytest.mark.parametrize("name", ["environment.json", "inputs.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"{", b"7\n"])
def test_a_damaged_record_is_named_with_its_remedy(
    keys: list[str], tmp_path: Path, name: str, content: bytes
):
    """Claim: whatever a power cut leaves of a run's own files, a start names the file and what to
    do, and doing it goes on."""
    file = tmp_path / "run" / name
    whole = file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{file} is damaged \(.*(remove it|copy config)"):
        check(keys)
    if name == "config.yaml":
        file.write_bytes(whole)  # as it lies in each checkpoint
    else:
        file.unlink()
    check(keys)
