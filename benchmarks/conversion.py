"""Throughput and memory of import_hf and export_hf on random models.

    python -m benchmarks.conversion throughput   # a model of Qwen3-0.6B's shape, bf16, against cp
    python -m benchmarks.conversion memory       # a model of 4.3 GiB, no tensor above 32 MiB

``cp`` copies the same bytes and flushes them to disk, as a conversion does. Runs alternate, each in
a process of its own; the table has medians. Memory is the anonymous memory (RssAnon: no file stands
behind it) of the command and its children, read from outside every 10 ms.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from checkpoint_tools.export.safetensors_writer import write_weights
from megatron_opdlm.model_files.shape import hf_names, read_shape

SMALLEST = {  # Qwen3-0.6B
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
# Every tensor of at most 32 MiB in float32; in Megatron's names the largest is linear_fc1's.
MANY_SMALL = SMALLEST | {
    "intermediate_size": 4096,
    "num_hidden_layers": 60,
    "vocab_size": 8192,
}
_SAMPLE_SECONDS = 0.01
_IMPORT = """
import sys, time
from pathlib import Path
from checkpoint_tools import import_hf
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.model_files.safetensors_dir import open_weights
import checkpoint_tools.streaming.weight_writer
with open_weights(sys.argv[1]) as weights:
    start = time.perf_counter()
    import_hf.convert(weights, Path(sys.argv[2]), BlockContract(mask_token_id=7), sys.argv[3])
    print(time.perf_counter() - start)
"""
_EXPORT = """
import sys, time
from pathlib import Path
from checkpoint_tools import export_hf
import checkpoint_tools.streaming.megatron_weights
from megatron_opdlm.model_files.manifest import read_manifest
from megatron_opdlm.model_files.shape import read_shape
export_hf.compare = lambda *arguments, **options: []
source = Path(sys.argv[1])
manifest, shape = read_manifest(source), read_shape(source / "huggingface")
start = time.perf_counter()
out, dtype = Path(sys.argv[2]), sys.argv[3]
export_hf.convert(source, out, manifest, shape, model_format="qwen3", dtype=dtype)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Make a model, measure, print a table, remove everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=5, help="throughput: runs of each kind")
    parser.add_argument("--commands", action="store_true", help="throughput: whole commands, too")
    parser.add_argument("--layers", type=int, help="of the model, for a quick try")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        if arguments.what == "memory":
            print_memory(measure_memory(root, layers=arguments.layers))
        else:
            measure_throughput(root, arguments.repeats, arguments.layers, arguments.commands)


def make_model(directory: Path, sizes: dict[str, int], dtype: str, layers: int | None) -> int:
    """Write a random tied Qwen3 without a tokenizer; returns the bytes of its weights."""
    directory.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 5,
        **sizes,
    }
    if layers is not None:
        config["num_hidden_layers"] = layers
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    shape = read_shape(directory)
    write_weights(directory, shape, _random_weights(hf_names(shape)), dtype)
    return (directory / "model.safetensors").stat().st_size


def _random_weights(names: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms near one, the rest small: rows of one random block, each tensor another rotation."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for number, (name, size) in enumerate(names.items()):
        tensor = torch.empty(size)
        flat = tensor.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block.roll(number * 977 + start // len(block))[: len(part)])
        yield name, tensor + 1 if name.endswith("norm.weight") else tensor


# --- throughput


@dataclass(frozen=True)
class Kind:
    """One thing that is timed: a program that makes its last argument, and says how long it took
    or is timed whole.
    """

    name: str
    command: Sequence[str]
    says_seconds: bool


def measure_throughput(root: Path, repeats: int, layers: int | None, commands: bool) -> None:
    """Print seconds and the ratio to ``cp`` of the same bytes."""
    size = make_model(root / "hf", SMALLEST, "bf16", layers)
    once = [sys.executable, "-c", _IMPORT, str(root / "hf"), str(root / "megatron"), "bf16"]
    subprocess.run(once, check=True, timeout=3000, stdout=subprocess.DEVNULL)
    out = str(root / "out")
    tool = [sys.executable, "-m"]
    kinds = [
        Kind(
            "cp and sync",
            ["sh", "-c", f"cp {root}/hf/model.safetensors {out} && sync {out}"],
            False,
        ),
        Kind("import_hf", [sys.executable, "-c", _IMPORT, str(root / "hf"), out, "bf16"], True),
        Kind(
            "export_hf", [sys.executable, "-c", _EXPORT, str(root / "megatron"), out, "bf16"], True
        ),
    ]
    if commands:
        of_import = ["checkpoint_tools.import_hf", "--hf", str(root / "hf"), "--out", out]
        of_export = ["checkpoint_tools.export_hf", "--checkpoint", str(root / "megatron")]
        kinds += [
            Kind("import_hf, whole command", [*tool, *of_import], False),
            Kind(
                "export_hf, whole command with its verification",
                [*tool, *of_export, "--format", "qwen3", "--out", out],
                False,
            ),
        ]
    seconds: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            seconds[kind.name].append(_time(kind))
            shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
    print(f"{size:,} bytes, {repeats} alternating runs, medians")
    print(f"{'':48} {'seconds':>8} {'GB/s':>6} {'ratio to cp':>12} {'runs, seconds'}")
    reference = statistics.median(seconds[kinds[0].name])
    for kind in kinds:
        own = statistics.median(seconds[kind.name])
        runs = " ".join(f"{run:.2f}" for run in seconds[kind.name])
        print(f"{kind.name:48} {own:8.2f} {size / own / 1e9:6.2f} {reference / own:12.2f} {runs}")


def _time(kind: Kind) -> float:
    start = time.perf_counter()
    done = subprocess.run(kind.command, check=True, timeout=3000, capture_output=True, text=True)
    whole = time.perf_counter() - start
    return float(done.stdout.split()[-1]) if kind.says_seconds else whole


# --- memory


@dataclass(frozen=True)
class Peak:
    """Largest anonymous memory of one command."""

    name: str
    bytes: int


def measure_memory(root: Path, *, layers: int | None = None) -> tuple[int, list[Peak]]:
    """(bytes of the weights, peak of each command) for a float32 model of many small tensors."""
    size = make_model(root / "hf", MANY_SMALL, "fp32", layers)
    hf, checkpoint, out = (str(root / name) for name in ("hf", "megatron", "out"))
    of_import, of_export = (
        [sys.executable, "-m", f"checkpoint_tools.{name}"] for name in ("import_hf", "export_hf")
    )
    peaks = [
        _peak(
            "import_hf",
            [*of_import, "--hf", hf, "--out", checkpoint, "--mask-token-id", "7"],
        ),
        _peak("export_hf without verify", [sys.executable, "-c", _EXPORT, checkpoint, out, "fp32"]),
    ]
    shutil.rmtree(out)
    peaks.append(
        _peak(
            "export_hf",
            [*of_export, "--checkpoint", checkpoint, "--out", out, "--format", "a2d-qwen3"],
        )
    )
    return size, peaks


def print_memory(measured: tuple[int, list[Peak]]) -> None:
    size, peaks = measured
    print(f"weights of {size / 2**30:.2f} GiB")
    for peak in peaks:
        print(f"{peak.name:48} {peak.bytes / 2**30:6.2f} GiB anonymous")


def _peak(name: str, command: Sequence[str]) -> Peak:
    with tempfile.TemporaryFile() as log, _running(command, log) as process:
        watched, most = psutil.Process(process.pid), 0
        while process.poll() is None:
            most = max(most, sum(map(_anonymous, _family(watched))))
            time.sleep(_SAMPLE_SECONDS)
        log.seek(0)
        if process.returncode:
            sys.exit(f"{name} failed: {log.read().decode()[-2000:]}")
    return Peak(name, most)


@contextmanager
def _running(command: Sequence[str], log: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _family(process: psutil.Process) -> list[int]:
    try:
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
