"""What ``opdlm doctor`` finds here, and where a machine or a configuration is broken."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.doctor import inputs, machine, ranks, run
from launch.doctor.finding import Finding
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.hardware import select_hardware
from tests.conftest import MASK, TinyModels
from tests.training_run import write_prompts


def lines(found: Iterable[Finding]) -> str:
    return "\n".join(map(str, found))


def test_a_line_says_how_bad_it_is_and_what_to_do():
    assert str(Finding(name="disk", text="1 GiB free")) == "ok      disk            1 GiB free"
    note = Finding(name="disk", text="slow", remedy="another")
    assert str(note) == "note    disk            slow; another"
    assert str(replace(note, breaks=True)).startswith("breaks  disk ")


def test_versions_are_held_against_ranges_and_pins():
    """Claim: a missing or too old dependency breaks; a missing extra and an untested version are
    notes with the remedy; local parts (+cpu) are no difference."""
    tested = {"torch": "2.13.0", "numpy": "2.3.5"}
    good = machine.installed_versions() | tested
    assert lines(machine.versions(good | {"torch": "2.13.0+cpu"}, tested)).startswith("ok ")
    text = lines(machine.versions(good | {"numpy": "2.4.0"}, tested))
    assert "note    versions        numpy 2.4.0 (tested: 2.3.5); launch/setup.sh" in text
    text = lines(machine.versions(good | {"torch": "2.8.0"}, tested))
    assert "breaks  versions        torch 2.8.0 is not <2.14,>=2.9" in text
    bad = {name: v for name, v in good.items() if name not in ("math-verify", "tqdm")}
    text = lines(machine.versions(bad, tested))
    assert "breaks  versions        tqdm is not installed" in text
    assert "note    [evaluation]    math-verify is not installed" in text


def test_a_gpu_that_pytorch_cannot_use_breaks(monkeypatch: pytest.MonkeyPatch):
    cpu = select_hardware()
    monkeypatch.setattr(machine, "count_gpus", lambda: 8)
    text = lines(machine.accelerators(cpu))
    assert text.startswith("breaks  GPUs") and "nvidia-smi lists 8" in text and "--gpu" in text
    monkeypatch.setattr(machine, "count_gpus", lambda: 0)
    assert lines(machine.accelerators(cpu)).startswith("note    GPUs")


def test_each_part_names_its_kernel_and_why():
    hardware = select_hardware()
    text = lines(machine.kernels(load_config(None, []), hardware))
    assert (
        "student         local layers with dense attention: FlexAttention has no backward" in text
    )
    assert "decoding by buckets (preferred here) for heads of 128" in text
    assert "(rollout.attention=auto), without captured graphs" in text
    capturing = replace(hardware, captures=lambda: lambda run: lambda: run())
    rows = lines(machine.kernels(load_config(None, ["rollout.attention=rows"]), capturing))
    assert "(rollout.attention=rows), with captured graphs" in rows
    with pytest.raises(InputError, match=r"attention\.backend=te needs Transformer Engine"):
        lines(machine.kernels(load_config(None, ["attention.backend=te"]), hardware))


def test_room_and_speed_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Claim: room for less than one checkpoint breaks, for less than those kept is a note; the
    probe leaves nothing behind; where files cannot be written, that breaks."""
    config = load_config(None, [f"train.out={tmp_path / 'a' / 'run'}", "checkpoint.keep=2"])
    usage = SimpleNamespace(free=100 << 30)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage)
    for gibibytes, level in ((30, "ok "), (40, "note "), (101, "breaks ")):
        room, speed = machine.disk(config, gibibytes << 30, probe_bytes=1 << 20)
        assert str(room).startswith(level) and f"a checkpoint takes {gibibytes}.0 GiB" in room.text
        assert "MB/s" in speed.text and "by one rank" in speed.text
    assert not list(tmp_path.iterdir())

    def refuse(*_: object) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(machine, "wait_for_lock", refuse)
    _, speed = machine.disk(config, 0, probe_bytes=1 << 20)
    assert speed.breaks and "No locks available" in speed.text and speed.remedy
    assert not list(tmp_path.iterdir())


def test_little_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: (64 << 20, 0, 60 << 20))
    assert "docker run --ipc=host" in lines(machine.shared_memory())


def test_ranks_are_started_where_nobody_did(tmp_path: Path):
    """Claim: two ranks of gloo reach each other, sum right and see the directory; the probe's file
    does not stay."""
    meeting = ranks.start_and_meet(2, tmp_path)
    assert (meeting.world, meeting.hosts, meeting.backend) == (2, 1, "gloo")
    assert meeting.right and not meeting.differing and not meeting.blind
    assert lines(ranks.findings(meeting, tmp_path)).startswith(
        "ok      ranks           2 over gloo"
    )
    assert not list(tmp_path.iterdir())


def test_ranks_that_are_not_alike_are_named(tmp_path: Path):
    meeting = ranks.Meeting(
        backend="nccl",
        world=16,
        hosts=2,
        right=False,
        latency_seconds=2e-5,
        bytes_per_second=3e11,
        differing=["PyTorch: 2.9.0, 2.13.0"],
        blind=[8, 9],
    )
    text = lines(ranks.findings(meeting, tmp_path))
    assert "16 over nccl on 2 machine(s): a sum takes 20 us, 300.00 GB/s; sums are wrong" in text
    assert "note    ranks           not alike: PyTorch: 2.9.0, 2.13.0" in text
    assert "breaks  ranks           ranks [8, 9] do not see files" in text


@pytest.fixture
def keys(models: TinyModels, tmp_path: Path) -> list[str]:
    """Keys of a configuration that is in order."""
    return [
        f"model.path={models.hf('student', tied=True)}",
        f"model.mask_token_id={MASK}",
        f"data.path={write_prompts(tmp_path / 'prompts.jsonl')}",
        f"train.out={tmp_path / 'run'}",
    ]


def test_models_and_data_are_what_training_would_find(keys: list[str]):
    found, config = inputs.Models(), load_config(None, keys)
    text = lines(inputs.models(config, 2, found))
    assert f"mask token      id {MASK} of 67; end tokens [48, 46]" in text
    assert "layout          2 ranks = tensor 1 x pipeline 1 x context 1 x data 2" in text
    assert found.student is not None
    assert found.checkpoint_bytes == 14 * found.student.shape.parameters
    assert "13 usable, 0 skipped" in lines(inputs.data(config, found))
    config = load_config(None, [*keys, "model.tensor_parallel=2"])
    with pytest.raises(InputError, match="3 ranks cannot be split"):
        lines(inputs.models(config, 3, inputs.Models()))
    unset = load_config(None, [])
    assert "model.path      not set" in lines(inputs.models(unset, 1, inputs.Models()))
    assert "data.path       not set" in lines(inputs.data(unset, inputs.Models()))


def test_the_command_goes_on_after_what_breaks(
    keys: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Claim: everything that is wrong is named in one run, then the command fails with one line."""
    monkeypatch.setattr(ranks, "start_and_meet", lambda count, place: 1 / 0)
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 20)
    monkeypatch.chdir(Path(keys[-1].partition("=")[2]).parent)
    bad = ["model.mask_token_id=67", "data.path=absent.jsonl"]
    monkeypatch.setattr("sys.argv", ["opdlm doctor", *keys, *bad])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RunError, match="would not work here: ranks, models; see the lines"):
        run.main()
    text = capsys.readouterr().out
    assert "breaks  ranks           ZeroDivisionError" in text
    assert "breaks  models" in text and "67" in text
    assert "note    data.path       not read" in text
    assert "ok      disk " in text


@pytest.mark.slow
def test_the_self_test_trains(tmp_path: Path):
    from launch.doctor.self_test import self_test

    (found,) = self_test(2)
    assert not found.breaks and found.text.startswith("2 training steps on 2 ranks in ")
