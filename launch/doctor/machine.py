"""The machine: installed versions, GPUs, what computes each part, shared memory, the disk."""

import os
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from launch.doctor.finding import Finding
from launch.environment import normal, pins
from launch.pipeline_settings import count_gpus
from launch.stages import ROOT
from megatron_opdlm.config import Config
from megatron_opdlm.run.file_lock import wait_for_lock

if TYPE_CHECKING:
    from megatron_opdlm.hardware import Hardware

GIB = 2**30
SET_UP = "launch/setup.sh brings the tested versions"
SHARED_MEMORY = GIB  # bytes that NCCL's buffers of eight ranks fit in; Docker's default is 64 MiB
SLOW_DISK = 200e6  # bytes a second
PROBE_BYTES = 128 << 20  # written and read to time the disk


def tested_versions() -> dict[str, str]:
    """Package -> the version that set-up chose: its own record, else the project's pins."""
    record = Path(sys.prefix) / "constraints.txt"
    if record.is_file():
        return pins(record)
    return pins(ROOT / "launch" / "constraints.txt") | pins(ROOT / "launch" / "torch-cpu.txt")


def installed_versions() -> dict[str, str]:
    """Package -> version; the first on the path is the one that is imported."""
    found: dict[str, str] = {}
    for package in distributions():
        found.setdefault(normal(package.metadata["Name"] or ""), package.version)
    return found


def versions(
    installed: Mapping[str, str] | None = None, tested: Mapping[str, str] | None = None
) -> Iterator[Finding]:
    """Installed packages against the project's ranges and the tested versions."""
    installed = installed_versions() if installed is None else installed
    tested = tested_versions() if tested is None else tested
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"]:
        if wrong := _unmet(Requirement(text), installed):
            yield Finding(name="versions", text=wrong, remedy=SET_UP, breaks=True)
    for extra, wanted in project["optional-dependencies"].items():
        lacks = [w for text in wanted if (w := _unmet(Requirement(text), installed))]
        if lacks and extra not in ("gpu", "dev"):
            yield Finding(name=f"[{extra}]", text=", ".join(lacks), remedy=SET_UP)
    differing = [
        f"{name} {installed[name]} (tested: {version})"
        for name, version in sorted(tested.items())
        if name in installed and installed[name].split("+")[0] != version.split("+")[0]
    ]
    if differing:
        yield Finding(name="versions", text=", ".join(differing), remedy=SET_UP)
    else:
        python = ".".join(map(str, sys.version_info[:3]))
        same = len(set(tested) & set(installed))
        yield Finding(name="versions", text=f"Python {python}; {same} packages as tested")


def _unmet(requirement: Requirement, installed: Mapping[str, str]) -> str:
    """What is wrong with an installed package, "" where nothing is."""
    version = installed.get(normal(requirement.name))
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}"
    return ""


def accelerators(hardware: "Hardware") -> Iterator[Finding]:
    """GPUs as PyTorch sees them, and as the driver does."""
    listed = count_gpus()
    if hardware.device.type == "cpu":
        text = f"none that PyTorch can use: {hardware.reason}"
        if listed:
            remedy = "this PyTorch is a CPU build or older than the driver: launch/setup.sh --gpu"
            text += f", but nvidia-smi lists {listed}"
            yield Finding(name="GPUs", text=text, remedy=remedy, breaks=True)
        else:
            yield Finding(name="GPUs", text=text, remedy="good for tests and tiny models")
        return
    from megatron_opdlm.hardware.gpu import device_states, libraries

    yield Finding(name="GPUs", text=libraries())
    for number, (name, total, free, capability) in enumerate(device_states()):
        text = f"{name}, {total / GIB:.0f} GiB, {free / GIB:.0f} GiB free, capability {capability}"
        in_use = free < 0.9 * total
        remedy = "something else runs there: see nvidia-smi" if in_use else ""
        yield Finding(name=f"GPU {number}", text=text, remedy=remedy)


USUAL_HEAD = 128  # numbers of a head, in every published Qwen3


def kernels(config: Config, hardware: "Hardware") -> Iterator[Finding]:
    """Which implementation each part would use, and why."""
    from megatron_opdlm.model.decode_choice import choose_decode_attention
    from megatron_opdlm.model.kernels import reason
    from megatron_opdlm.optimizer import gradient_sums
    from megatron_opdlm.run.build import kernels_of, resolve_dtype

    student, teacher = kernels_of(config, hardware)
    for name, kernel in (("student", student), ("teacher", teacher)):
        yield Finding(name=name, text=f"{kernel}: {reason(hardware)}")
    asked = config.rollout.attention
    dtype = resolve_dtype(config.model.dtype, hardware)
    way = choose_decode_attention(asked, dtype, USUAL_HEAD, hardware)
    graphs = way.kernel is not None and config.rollout.graphs and hardware.captures is not None
    text = (
        f"{way} for heads of {USUAL_HEAD} (rollout.attention={asked}), "
        f"{'with' if graphs else 'without'} captured graphs"
    )
    yield Finding(name="rollout", text=text)
    yield Finding(name="gradients", text=gradient_sums(student.spec))


def shared_memory(place: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room in /dev/shm, through which the ranks of a node speak."""
    total, _, free = shutil.disk_usage(place)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free in {place}"
    remedy = f"give {SHARED_MEMORY / GIB:g} GiB or more: docker run --ipc=host or --shm-size"
    yield Finding(name="shared memory", text=text, remedy="" if free >= SHARED_MEMORY else remedy)


def disk(config: Config, needed_bytes: int, probe_bytes: int = PROBE_BYTES) -> Iterator[Finding]:
    """Room for checkpoints where the run will lie, how fast it is, and whether files can be locked.
    ``needed_bytes``: of one checkpoint; 0: not known.
    """
    place = existing(Path(config.train.out or "."))
    free = shutil.disk_usage(place).free
    kept = config.checkpoint.keep + 1  # the next is whole before the oldest goes
    text = f"{free / GIB:.1f} GiB free in {place}"
    if needed_bytes:
        text += f"; a checkpoint takes {needed_bytes / GIB:.1f} GiB, {kept} are there at a time"
    short = free < kept * needed_bytes
    remedy = "make room, use checkpoint.keep=1 or another train.out" if short else ""
    yield Finding(name="disk", text=text, remedy=remedy, breaks=free < needed_bytes)
    if free > 2 * probe_bytes:
        yield _speed(place, needed_bytes, probe_bytes)


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _speed(place: Path, needed_bytes: int, size: int) -> Finding:
    file = place / f".opdlm_doctor_{os.getpid()}"
    try:
        with file.open("w+b") as probe:
            if not wait_for_lock(probe.fileno(), 1, f"{file} is locked"):
                return Finding(name="disk", text=f"{place}: a new file is locked", breaks=True)
            start = time.perf_counter()
            for _ in range(size >> 20):
                probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
            written = size / (time.perf_counter() - start)
            os.posix_fadvise(probe.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from memory
            probe.seek(0)
            start = time.perf_counter()
            while probe.read(1 << 20):
                pass
            read = size / (time.perf_counter() - start)
    except OSError as error:
        remedy = "use a train.out where files can be written and locked"
        return Finding(name="disk", text=f"{place}: {error}", remedy=remedy, breaks=True)
    finally:
        file.unlink(missing_ok=True)
    text = f"writes {written / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    if needed_bytes:
        text += f": a checkpoint takes {needed_bytes / written:,.0f} s by one rank"
    slow = min(written, read) < SLOW_DISK
    return Finding(name="disk speed", text=text, remedy="a local or parallel disk" if slow else "")
