"""What a file is that is not what its name says, by its first bytes."""

from pathlib import Path

_BYTES = 64
_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file; fetch it with: git lfs pull",
    ),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"GGUF", "a GGUF file; use the model's safetensors files"),
    (b"PK\x03\x04", "a zip archive or a PyTorch file; use the file that its name promises"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"<!DOCTYPE html", "a web page, not the file; download it again"),
    (b"<html", "a web page, not the file; download it again"),
)


def foreign_kind(path: Path) -> str | None:
    """``what it is; remedy`` where the file is surely neither text nor safetensors, else None."""
    with path.open("rb") as file:
        start = file.read(_BYTES)
    return next((kind for magic, kind in _KINDS if start.startswith(magic)), None)
