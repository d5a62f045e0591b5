"""Directories that appear whole or not at all: written under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opdlm.errors import InputError
from megatron_opdlm.storage.output_paths import check_place


def check_free(out: Path) -> None:
    """Raise InputError when ``out`` already holds something, or lies where nothing can be made; an
    empty directory is free.
    """
    check_place(out, f"--out {out}")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        kind = "already holds files" if out.is_dir() else "is a file"
        raise InputError(f"--out {out} {kind}; choose another directory, or remove it first")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``out``; rename it to ``out`` if the body succeeds, else
    remove it.

    Only the rank that writes may call this. Raises InputError when ``out`` already holds something.
    """
    out = Path(os.path.abspath(out))
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        check_free(out)  # someone else may have been quicker
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, out: Path) -> None:
    """Give a finished directory its final name, its bytes on disk before the name is."""
    for path in [temporary, *temporary.rglob("*")]:
        _sync(path)
    os.rename(temporary, out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
