"""SHA-256 of files: taken while they are written, checked before they are read."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, Self

_CHUNK = 1 << 22  # bytes read at a time


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


class HashingFile:
    """A new file that knows its length and checksum; on disk when the ``with`` block is left.

    A failed write raises OSError at the end of the block only: the writers that this is handed to
    (PyTorch's archive writer is one) cannot pass an exception on.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._failure: OSError | None = None
        self.bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append; returns the number of bytes as a file does."""
        count = memoryview(data).nbytes
        self.bytes += count
        if self._failure is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self._failure = error
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Part of a file's interface; the end of the block does it."""

    @property
    def sha256(self) -> str:
        """Checksum of what has been written so far."""
        return self._digest.hexdigest()

    def raise_failure(self) -> None:
        """Raise the OSError of a write that failed earlier, so that no more work is done."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        try:
            if kind is None and self._failure is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            _close(self._file, quietly=kind is not None or self._failure is not None)
        if kind is None:
            self.raise_failure()


def _close(file: BinaryIO, *, quietly: bool) -> None:
    """Close; what a full disk did not take is tried once more there, and fails once more."""
    try:
        file.close()
    except OSError:
        if not quietly:
            raise
