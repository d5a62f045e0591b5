"""A profile of a few steps of a run: what each phase spends time or memory on (docs/profiling.md).

A profile is begun before a step's first phase and ended after its last one. It changes nothing of
what a step computes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from torch.profiler import profile, record_function

from megatron_opdlm.config import Config
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware, gpu
from megatron_opdlm.model_files.writing import new_directory, write_text

DIRECTORY = "profile"  # of a run directory
_ROWS = 60  # operators of the table


class _Recorder(Protocol):
    """One kind of profile."""

    def start(self) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[object]: ...

    def stop(self, out: Path) -> None: ...


class Profiler:
    """The profile of one rank: at most one, of the steps that ``profile.steps`` names."""

    def __init__(self, config: Config, hardware: Hardware, rank: int) -> None:
        """InputError where this machine has not what the kind needs, on all ranks alike."""
        section = config.profile
        self._out = Path(config.train.out) / DIRECTORY
        self._kind, self._rank = section.kind, rank
        self._steps = range(section.steps[0], section.steps[1] + 1) if section.steps else range(0)
        recorder = _recorder(section.kind, hardware) if section.steps else None
        self._recorder = recorder if rank in section.ranks else None
        self._first = 0  # step that the profile under way began with; 0: none is
        self._last = 0  # finished step

    def begin(self, step: int) -> None:
        """Start where the step is the first one to be profiled."""
        if self._recorder is None or self._first or step not in self._steps:
            return
        self._first = step
        self._recorder.start()

    def phase(self, name: str) -> AbstractContextManager[object]:
        """The body bears the phase's name in the profile."""
        if self._recorder is None or not self._first:
            return nullcontext()
        return self._recorder.phase(name)

    def end(self, step: int) -> None:
        """Write the profile where the step was the last one."""
        self._last = step
        if self._first and step == self._steps[-1]:
            self._finish()

    def close(self) -> None:
        """Write what there is of a profile whose last step the run does not reach."""
        if self._first:
            self._finish()

    def _finish(self) -> None:
        assert self._recorder is not None
        name = f"{self._kind}_steps_{self._first}-{self._last}_rank_{self._rank}"
        self._recorder.stop(self._out / name)
        self._recorder, self._first = None, 0


def _recorder(kind: str, hardware: Hardware) -> _Recorder:
    on_cpu = hardware.device.type == "cpu"
    if kind == "nsys" and on_cpu:
        raise InputError(
            "profile.kind=nsys needs a GPU, which NVIDIA Nsight Systems looks at "
            f"({hardware.reason}); use profile.kind=torch"
        )
    if kind == "nsys":
        return _Capture()
    if kind == "memory" and not on_cpu:
        return _Snapshot()
    return _Operators(memory=kind == "memory")


class _Operators:
    """torch.profiler: every operator and kernel, in time."""

    def __init__(self, *, memory: bool) -> None:
        self._memory = memory

    def start(self) -> None:
        self._profile = profile(profile_memory=self._memory)
        self._profile.start()

    def phase(self, name: str) -> AbstractContextManager[object]:
        return record_function(name)

    def stop(self, out: Path) -> None:
        self._profile.stop()
        averages = self._profile.key_averages()
        by = "self_cpu_memory_usage" if self._memory else _slowest_by(averages)
        table = averages.table(sort_by=by, row_limit=_ROWS)
        with _new(out) as made:
            if made is not None:
                self._profile.export_chrome_trace(str(made / "trace.json.gz"))
                write_text(made / "table.txt", table + "\n")


def _slowest_by(averages: object) -> str:
    """Kernels' own time where there were kernels, else the operators' own time on the CPU."""
    events = list(averages)  # pyright: ignore[reportArgumentType] -- a list that says it is none
    on_device = any(event.self_device_time_total for event in events)
    return "self_device_time_total" if on_device else "self_cpu_time_total"


class _Snapshot:
    """Every allocation of a GPU with where it came from. Not run on a GPU yet."""

    def start(self) -> None:
        gpu.record_memory()

    def phase(self, name: str) -> AbstractContextManager[object]:
        return record_function(name)

    def stop(self, out: Path) -> None:
        with _new(out) as made:
            if made is not None:
                gpu.write_memory(made / "snapshot.pickle")


class _Capture:
    """What ``nsys profile --capture-range=cudaProfilerApi`` waits for, an NVTX range a phase. Not
    run on a GPU yet.
    """

    def start(self) -> None:
        gpu.start_capture()

    def phase(self, name: str) -> AbstractContextManager[object]:
        return gpu.named_range(name)

    def stop(self, out: Path) -> None:
        gpu.stop_capture()


@contextmanager
def _new(out: Path) -> Iterator[Path | None]:
    """A directory that appears whole; None where an earlier start has made it."""
    if out.exists():
        yield None
        return
    with new_directory(out) as made:
        yield made
