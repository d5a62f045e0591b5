"""What the container's ``launch/setup.sh --gpu`` asks of pip can be had for its Python and PyTorch.

The image's own PyTorch and Transformer Engine are pre-releases that no index has: empty
distributions of their versions stand in for them here.
"""

import base64
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from launch.environment import HELD, pins

REPOSITORY = Path(__file__).parents[3]
# nvcr.io/nvidia/pytorch:25.12-py3, the Dockerfile's default. Which NumPy it has is not published,
# so the pins go with the last 1.x and with 2.x.
IMAGE = {
    "torch": "2.10.0a0+b4e4ee81d3",
    "transformer-engine": "2.10.0+769ed778",
    "flash-attn": "2.7.4.post1+25.12",
    "triton": "3.5.1",
}
NUMPY = ("1.26.4", "2.1.0")
PYTHON = "3.12"


# Only their sources are published; pip builds them from Python alone.
SOURCES = ("langdetect", "rouge-score", "sqlitedict", "tempdir", "wget", "word2number")


def stand_in(folder: Path, name: str, version: str) -> None:
    """A wheel without files."""
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    digest = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for path, text in files.items()
    }
    lines = [f"{path},sha256={digest[path]},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="no clone")
def test_the_image_holds_the_whole_repository():
    """Claim: the build passes over nothing that is tracked, so that all tests can run there."""
    everything, *kept = (REPOSITORY / ".dockerignore").read_text().split()
    listed = ["git", "-C", str(REPOSITORY), "ls-tree", "--name-only", "HEAD"]
    tracked = subprocess.run(listed, capture_output=True, text=True, check=True, timeout=60)
    assert everything == "*"
    assert {"!" + name for name in tracked.stdout.split()} <= {*kept}


def test_the_dockerfile_s_image_is_the_one_tested():
    base = re.search(r"ARG BASE=.*:(\S+)-py3", (REPOSITORY / "Dockerfile").read_text())
    assert base is not None and base[1] == "25.12"


@pytest.mark.slow
@pytest.mark.parametrize("numpy", NUMPY)
def test_pins_resolve_against_the_image(tmp_path: Path, numpy: str):
    """Claim: for the image's Python, with its own PyTorch, Transformer Engine and flash-attn held,
    pip finds every pinned package, and replaces none of those."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    image = IMAGE | {"numpy": numpy}
    for name, version in image.items():
        stand_in(wheels, name, version)
    pinned = pins(REPOSITORY / "launch/constraints.txt")
    for name in SOURCES:
        stand_in(wheels, name, pinned[name])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    wanted += [
        line
        for extra in ("gpu", "evaluation", "lm-eval", "quantization", "tracking", "dev")
        for line in optional[extra]
    ]
    own = {k: v for k, v in pinned.items() if not HELD.fullmatch(k)}
    held = "".join(f"{name}=={version}\n" for name, version in (own | image).items())
    (tmp_path / "constraints.txt").write_text(held)
    (tmp_path / "requirements.txt").write_text("\n".join(wanted) + "\n")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-input"]
    where = ["--python-version", PYTHON, "--only-binary", ":all:", "--target", str(tmp_path / "to")]
    files = [
        "--constraint",
        tmp_path / "constraints.txt",
        "--requirement",
        tmp_path / "requirements.txt",
    ]
    done = subprocess.run(
        [*pip, *where, "--find-links", wheels, *files],
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    for name, version in image.items():
        if name != "flash-attn":  # the code uses it where it is there, and asks for nothing
            assert f" {name}-{version} " in last.replace("_", "-") + " " or name == "triton", last
