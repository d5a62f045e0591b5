"""What a profile records: the steps, ranks and kind that were asked for, and nothing otherwise."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config import Config, load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware, gpu, select_hardware
from megatron_opdlm.reporting.accounting import Stopwatch
from megatron_opdlm.reporting.profiling import Profiler

PHASES = ("rollout", "update")


def config(out: Path, *keys: str) -> Config:
    return load_config(None, [f"train.out={out}", *keys])


def train(profiler: Profiler, first: int, last: int) -> None:
    """Steps of two phases that multiply a matrix."""
    for step in range(first, last + 1):
        profiler.begin(step)
        watch = Stopwatch(around=profiler.phase)
        for name in PHASES:
            with watch.phase(f"{name}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.end(step)
    profiler.close()


def trace(directory: Path) -> list[str]:
    """Names of all events of a trace."""
    events = json.loads(gzip.decompress((directory / "trace.json.gz").read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path):
    """Claim: steps 2 to 3 of 4, each phase twice, in a directory of the run, with a table; a rank
    that is not named and a run without profile.steps write nothing."""
    keys = config(tmp_path, "profile.steps=[2,3]")
    train(Profiler(keys, select_hardware(), rank=1), 1, 4)
    train(Profiler(config(tmp_path), select_hardware(), rank=0), 1, 4)
    assert not list(tmp_path.iterdir())
    train(Profiler(keys, select_hardware(), rank=0), 1, 4)
    (made,) = (tmp_path / "profile").iterdir()
    assert made.name == "torch_steps_2-3_rank_0"
    names = trace(made)
    assert [names.count(phase) for phase in PHASES] == [2, 2] and "aten::mm" in names
    assert "aten::mm" in (made / "table.txt").read_text()


def test_a_run_that_goes_on_keeps_what_it_has(tmp_path: Path):
    """Claim: a start after the first step profiles the rest; a trace that is there stays; a run
    that ends early still writes."""
    keys = config(tmp_path, "profile.steps=[2,9]")
    train(Profiler(keys, select_hardware(), rank=0), 3, 4)
    (made,) = (tmp_path / "profile").iterdir()
    assert made.name == "torch_steps_3-4_rank_0" and trace(made).count("update") == 2
    before = (made / "trace.json.gz").read_bytes()
    train(Profiler(keys, select_hardware(), rank=0), 3, 4)
    assert (made / "trace.json.gz").read_bytes() == before
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_memory_on_a_cpu_is_counted_by_operator(tmp_path: Path):
    keys = config(tmp_path, "profile.steps=[1,1]", "profile.kind=memory")
    train(Profiler(keys, select_hardware(), rank=0), 1, 1)
    (made,) = (tmp_path / "profile").iterdir()
    assert made.name == "memory_steps_1-1_rank_0"
    assert "CPU Mem" in (made / "table.txt").read_text()


def on_gpu() -> Hardware:
    return replace(select_hardware(), device=torch.device("meta"))


def test_nsys_gets_a_capture_with_a_range_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Claim: on a GPU the capture covers the steps and every phase is a named range; on a CPU the
    kind is refused before anything is built."""
    calls: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            calls.append(f"<{self.name}")

        def __exit__(self, *_: object) -> None:
            calls.append(f"{self.name}>")

    monkeypatch.setattr(gpu, "start_capture", lambda: calls.append("start"))
    monkeypatch.setattr(gpu, "stop_capture", lambda: calls.append("stop"))
    monkeypatch.setattr(gpu, "named_range", Named)
    keys = config(tmp_path, "profile.steps=[2,2]", "profile.kind=nsys")
    train(Profiler(keys, on_gpu(), rank=0), 1, 3)
    assert calls == ["start", "<rollout", "rollout>", "<update", "update>", "stop"]
    assert not list(tmp_path.iterdir())  # nsys writes where it was told to
    with pytest.raises(InputError, match=r"profile\.kind=nsys needs a GPU"):
        Profiler(keys, select_hardware(), rank=0)


def test_memory_on_a_gpu_is_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "record_memory", lambda: None)
    monkeypatch.setattr(gpu, "write_memory", lambda file: Path(file).write_text("snapshot"))
    keys = config(tmp_path, "profile.steps=[1,1]", "profile.kind=memory")
    train(Profiler(keys, on_gpu(), rank=0), 1, 2)
    made = tmp_path / "profile" / "memory_steps_1-1_rank_0"
    assert [file.name for file in made.iterdir()] == ["snapshot.pickle"]


def test_steps_are_a_first_and_a_last_one():
    for steps in ("[3]", "[5,3]", "[1,2,3]"):
        with pytest.raises(InputError, match=r"profile\.steps=.*use \[FIRST,LAST\]"):
            load_config(None, [f"profile.steps={steps}"])
    with pytest.raises(InputError, match=r"profile\.steps\[0\]=0 must be at least 1"):
        load_config(None, ["profile.steps=[0,1]"])
