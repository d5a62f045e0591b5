"""The one writer that every file and directory goes through: where an output may lie, and contents
that appear whole or not at all, their bytes on disk before their name is.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_opdlm.errors import InputError, RunError

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def is_refused_write(error: BaseException) -> bool:
    """Whether the file system took no more bytes: full, over quota, read-only, broken."""
    return isinstance(error, OSError) and error.errno in _REFUSALS


def check_place(out: Path, what: str) -> None:
    """InputError where ``out`` (named ``what``, e.g. ``--out DIR``) would lie inside a file, or in
    a directory that may not be written to.
    """
    above = Path(os.path.abspath(out)).parents
    nearest = next(path for path in above if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"{what}: {nearest} is no directory; choose a place in a directory")
    kernels_own = nearest.parts[1:2] in (("proc",), ("sys",))  # writable by their modes only
    if kernels_own or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {nearest} may not be written to; choose another place")


def check_outside(out: Path, what: str, read: Mapping[str, Path | None]) -> None:
    """InputError where ``out`` (named ``what``) lies in a directory that is read: it would change
    what stands there. ``read``: what names each of them, and where it is.
    """
    target = Path(os.path.realpath(out))
    for name, source in read.items():
        if source is not None and source.is_dir():
            directory = Path(os.path.realpath(source))
            if directory == target or directory in target.parents:
                raise InputError(
                    f"{what} {out}: lies in {name} {source}, which is read; choose a place outside"
                )


def check_new_directory(out: Path, flag: str) -> None:
    """An output directory that is filled in place must be absent or empty."""
    check_place(out, f"{flag} {out}")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise InputError(f"{flag} {out}: exists and is not empty; choose another name or remove it")


def check_new_file(out: Path, flag: str) -> None:
    """An output file must not exist yet; its directory is made when it is written."""
    check_place(out, f"{flag} {out}")
    if out.exists():
        raise InputError(f"{flag} {out}: exists already; choose another name or remove it")


def check_free(out: Path) -> None:
    """Raise InputError when ``out`` already holds something, or lies where no directory can be
    renamed to it; an empty directory is free.
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


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def half_written(path: Path) -> Path:
    """The name that a file's new content has until it is whole; a kill may leave it."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream for the new content of ``path``: readers see the old or the new one, never
    half of it, and a failed body leaves the old one.
    """
    draft = half_written(path)
    try:
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content."""
    with replacing(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by text in UTF-8; lone surrogates are escaped."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Replace a file's content by JSON that people can read."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file's content by one JSON object a line, written as ``rows`` come."""
    with replacing(path) as stream:
        stream.writelines(json_line(row) for row in rows)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file; they are on disk afterwards. A kill may leave half of the last one."""
    with path.open("ab") as stream:
        stream.writelines(json_line(row) for row in rows)
        stream.flush()
        os.fsync(stream.fileno())


def json_line(row: Mapping[str, Any]) -> bytes:
    """A line of a JSONL file."""
    return (to_json(row) + "\n").encode("utf-8", errors="backslashreplace")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text. JSON has no NaN and no infinity, they become null; what else it has no form of
    (dates, decimals, paths) is written as its text.
    """
    return json.dumps(
        _finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


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
