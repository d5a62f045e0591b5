"""What setup.sh asks Python: is .venv whole, what made it, which versions a container brings; and
the one command that pip does not make there.

Standard library only; it runs before anything is installed.
"""

import argparse
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
INPUTS = (
    *("setup.sh", "environment.py", "constraints.txt", "torch-cpu.txt", "scorers.txt"),
    "../pyproject.toml",
)

# Built together in an NGC container; replacing one of them breaks the others. ModelOpt is Python
# on top of them, and the project's version may stand before the container's.
HELD = re.compile(
    r"(torch|torchvision|torchaudio|pytorch-triton|triton|numpy|apex|flash-attn.*"
    r"|transformer-engine.*|nvidia-(?!modelopt$).*|cuda-.*)"
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: Path) -> dict[str, str]:
    """``{name: version}`` of the ``name==version`` lines."""
    lines = (line.strip() for line in file.read_text().splitlines())
    entries = (line.split("==", 1) for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in entries}


def fingerprint(mode: str) -> str:
    """Changes with everything that decides what an environment holds."""
    digest = hashlib.sha256(f"{mode} {sys.version}".encode())
    for name in INPUTS:
        digest.update((LAUNCH / name).read_bytes())
    return digest.hexdigest()


def damage() -> Iterator[str]:
    """Files of installed packages that are missing or have another size than at installation."""
    for package in _own_packages():
        for file in package.files or []:
            if file.size is None or file.suffix == ".pyc":
                continue
            path = Path(str(package.locate_file(file)))
            if not path.is_file() or path.stat().st_size != file.size:
                yield f"{package.metadata['Name']}: {file}"


def drift(constraints: Path) -> Iterator[str]:
    """Packages whose version is not the pinned one."""
    pinned = pins(constraints)
    for package in _own_packages():
        wanted = pinned.get(normal(package.metadata["Name"]), package.version)
        if wanted not in (package.version, package.version.split("+")[0]):
            yield f"{package.metadata['Name']} {package.version}, not {wanted}"


def _own_packages() -> Iterator[Distribution]:
    """Packages inside .venv, without those it sees of a container."""
    return iter(distributions(path=[sysconfig.get_paths()["purelib"]]))


def make_torchrun(directory: Path) -> None:
    """Have a ``torchrun`` beside .venv's ``python``. Where PyTorch is a container's, pip finds it
    there and makes none, and the container's own runs the container's Python, without the project.
    """
    command = directory / "torchrun"
    if not command.exists():
        command.write_text('#!/bin/sh\nexec "${0%/*}/python" -m torch.distributed.run "$@"\n')
        command.chmod(0o755)


def constraints_for_container() -> str:
    """The container's versions of what must stay, the project's pins for all else."""
    versions = {
        normal(p.metadata["Name"]): p.version for p in distributions() if p.metadata["Name"]
    }
    held = {name: version for name, version in versions.items() if HELD.fullmatch(name)}
    merged = pins(LAUNCH / "constraints.txt") | held
    return "".join(f"{name}=={version}\n" for name, version in sorted(merged.items()))


def constraints_for_cpu() -> str:
    merged = pins(LAUNCH / "constraints.txt") | pins(LAUNCH / "torch-cpu.txt")
    return "".join(f"{name}=={version}\n" for name, version in sorted(merged.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "question", choices=["fingerprint", "damage", "drift", "constraints", "torchrun"]
    )
    parser.add_argument("--mode", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--constraints", type=Path, help="file of pins, for drift")
    arguments = parser.parse_args()
    if arguments.question == "fingerprint":
        print(fingerprint(arguments.mode))
    elif arguments.question == "torchrun":
        make_torchrun(Path(sys.executable).parent)
    elif arguments.question == "constraints":
        gpu = arguments.mode == "gpu"
        print(constraints_for_container() if gpu else constraints_for_cpu(), end="")
    else:
        found = damage() if arguments.question == "damage" else drift(arguments.constraints)
        problem = next(found, None)
        if problem is not None:
            sys.exit(problem)


if __name__ == "__main__":
    main()
