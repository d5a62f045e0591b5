"""Frames over file descriptors: a length (8 bytes, little-endian), then JSON text in UTF-8.

Standard library only: used by the grader, the jail's driver, judges and programs alike.
"""

import json
import os
import select
import time
from typing import Any

_LENGTH_BYTES = 8


class ChannelClosed(Exception):
    """The other side is gone, late, or sent what is no frame; the text says which."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Write one frame. ChannelClosed: nobody reads any more."""
    left = memoryview(frame(message))
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        raise ChannelClosed(f"cannot write: {error}") from error


def frame(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def receive(descriptor: int, *, limit: int, deadline: float | None = None) -> dict[str, Any]:
    """Read one frame of at most ``limit`` bytes until ``deadline`` (``time.monotonic()`` seconds).

    ChannelClosed: end of file, too late, too long, or no JSON object.
    """
    size = int.from_bytes(_read(descriptor, _LENGTH_BYTES, deadline), "little")
    if size > limit:
        raise ChannelClosed(f"a frame of {size} bytes; at most {limit}")
    return parse(_read(descriptor, size, deadline))


def parse(body: bytes) -> dict[str, Any]:
    """The object of a frame's body. ChannelClosed: it holds none."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ChannelClosed(f"no JSON in a frame: {error}") from error
    if not isinstance(message, dict):
        raise ChannelClosed("a frame that holds no object")
    return message


def _read(descriptor: int, size: int, deadline: float | None) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        if deadline is not None:
            poll = select.poll()  # select() cannot watch descriptors above 1023
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise ChannelClosed("no answer in time")
        try:
            chunk = os.read(descriptor, min(size - len(chunks), 1 << 20))
        except OSError as error:
            raise ChannelClosed(f"cannot read: {error}") from error
        if not chunk:
            raise ChannelClosed("the other side closed the channel")
        chunks += chunk
    return bytes(chunks)


class FrameReader:
    """Assembles frames from a non-blocking descriptor that an untrusted process writes to."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def frame(self) -> dict[str, Any] | None:
        """The next whole frame, or None. ChannelClosed: too long, or no JSON object."""
        if len(self.buffer) < _LENGTH_BYTES:
            return None
        size = int.from_bytes(self.buffer[:_LENGTH_BYTES], "little")
        if size > self.limit:
            raise ChannelClosed(f"a frame of {size} bytes; at most {self.limit}")
        if len(self.buffer) < _LENGTH_BYTES + size:
            return None
        body = bytes(self.buffer[_LENGTH_BYTES : _LENGTH_BYTES + size])
        del self.buffer[: _LENGTH_BYTES + size]
        return parse(body)
