"""Directories that appear whole or not at all: written under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.storage.output_paths import check_place, is_refused_write


def check_free(out: Path) -> None:
    """Raise InputError when ``out`` already holds something, or lies where nothing can be made; an
    empty directory is free.
    """
    check_place(out, f"--out {out}")
    out = Path(os.path.realpath(out))
    if os.path.ismount(out):
        raise InputError(f"--out {out} is a mount point; name a directory inside it")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        kind = "already holds files" if out.is_dir() else "is a file"
        raise InputError(f"--out {out} {kind}; choose another directory, or remove it first")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``out``; rename it to ``out`` if the body succeeds, else
    remove it.

    Only the rank that writes may call this. Raises InputError when ``out`` already holds something.
    """
    out = Path(os.path.realpath(out))  # a link is followed: its target gets the name
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        try:
            yield temporary
        except OSError as error:
            if not is_refused_write(error):
                raise
            raise RunError(
                f"--out {out} not written: {error}; make room, or choose another place"
            ) from error
        check_free(out)  # someone else may have been quicker
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, out: Path) -> None:
    """Give a finished directory its final name, its bytes on disk before the name is."""
    for path in [temporary, *temporary.rglob("*")]:
        sync(path)
    os.rename(temporary, out)
    sync(out.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
