"""What identifies a data file: its content, wherever it lies."""

import hashlib
from pathlib import Path

_CHUNK = 1 << 20  # bytes


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of a directory, over the names and contents of its files in order."""
    digest = hashlib.sha256()
    if path.is_file():
        _add(digest, path)
        return digest.hexdigest()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
