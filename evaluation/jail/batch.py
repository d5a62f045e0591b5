"""Many calls of one function in one request: replies are streamed, each with its own limit.

Standard library only, as all that runs inside a jail.
"""

import os
import select
import time
from collections.abc import Callable
from typing import Any

from evaluation.jail import channel
from evaluation.jail.child import Child, ending

_POLL_SECONDS = 0.05
_HELD_BYTES = 4 << 20  # of replies, before they are handed on; the program waits in its pipe


class Batch:
    """Calls under way. ``collect`` hands on replies until all are there or one is no value."""

    def __init__(
        self,
        child: Child,
        requests: int,
        replies: int,
        limit: int,
        request: dict[str, Any],
        still_wanted: Callable[[], None],
    ) -> None:
        """Send the calls. ``limit``: bytes of one reply; ``request``: ``name``, ``args``, a
        ``cpu`` limit and a ``wall`` limit each, and ``total``, the CPU limit of all together.
        """
        self.child, self.still_wanted = child, still_wanted
        self.requests, self.replies = requests, replies
        self.cpus, self.walls = request["cpus"], request["walls"]
        self.total = min(request["total"], sum(self.cpus))  # which may be infinite
        self.secret, self.number, self.used = os.urandom(16).hex(), 0, 0.0
        self.reader = channel.FrameReader(limit)
        self.poll = select.poll()
        self.poll.register(replies, select.POLLIN)
        self.early = bool(self.poll.poll(0))  # written ahead of the question, or gone
        names = {key: request[key] for key in ("name", "within") if key in request}
        calls = {"op": "call", **names, "calls": request["args"], "id": self.secret}
        self.unsent = memoryview(channel.frame(calls))  # no program can make us wait for it to read
        os.set_blocking(requests, False)
        self.poll.register(requests, select.POLLOUT)
        child.restart_clock()
        child.limit_cpu(self.total)

    def collect(self) -> list[dict[str, Any]]:
        """Some more replies; the last may say what went wrong."""
        found: list[dict[str, Any]] = []
        size = 0
        try:
            if self.early:
                return [self._failed("ended" if self.child.reap() else "broken_channel")]
            while self.number < len(self.cpus) and size < _HELD_BYTES:
                data = self._read()
                if isinstance(data, str):
                    return [*found, self._failed(data)]
                size += len(data)
                self.reader.feed(data)
                found += self._frames()
                if found and found[-1]["status"] != "ok":
                    return found
            if self.number == len(self.cpus) and self.reader.buffer:
                return [*found[:-1], self._failed("broken_channel")]
        except channel.ChannelClosed as error:
            return [*found, self._failed("broken_channel", str(error))]
        return found

    def _send(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.requests, self.unsent[: 1 << 16]) :]
        except BlockingIOError:
            return
        except OSError as error:
            raise channel.ChannelClosed(f"cannot write: {error}") from error
        if not self.unsent:
            self.poll.unregister(self.requests)
            os.set_blocking(self.requests, True)

    def _failed(self, status: str, detail: str = "") -> dict[str, Any]:
        used = self.child.cpu() - self.used
        return {"status": status, "cpu": used, "detail": detail[:500]}

    def _read(self) -> bytes | str:
        """What the program wrote, or the status that ends the batch."""
        while True:
            self.still_wanted()
            used = self.child.cpu()
            left = min(self.cpus[self.number], self.total - self.used) - (used - self.used)
            ready = [end for end, _ in self.poll.poll(min(_POLL_SECONDS, max(left, 0.002)) * 1000)]
            if self.replies in ready:
                data = os.read(self.replies, 1 << 20)
                if data:
                    return data
                self.child.await_ending()
                how = ending(self.child.status)
                return "ended" if how == "ok" else how
            if self.requests in ready:
                self._send()
            if left < 0:
                return "cpu_time"
            if time.monotonic() - self.child.wall_start > self.walls[self.number]:
                return "wall_time"

    def _frames(self) -> list[dict[str, Any]]:
        """Whole replies. Those that came together share their time: they are late only if they
        cannot all have been in time, so that a machine too busy to look fails no program.
        """
        answers, broken = [], None
        try:
            while (answer := self.reader.frame()) is not None:
                number = self.number + len(answers)
                told = (answer.pop("id", None), answer.pop("number", None))
                if told != (self.secret, number) or number >= len(self.cpus):
                    raise channel.ChannelClosed("a reply that nobody asked for")
                answers.append(answer)
        except channel.ChannelClosed as error:
            broken = self._failed("broken_channel", str(error))
        if not answers:
            return [broken] if broken else []
        used = self.child.cpu()
        limit = min(sum(self.cpus[self.number :][: len(answers)]), self.total - self.used)
        if used - self.used > limit:
            return [self._failed("cpu_time")]
        seconds, self.used = (used - self.used) / len(answers), used
        self.number += len(answers)
        self.child.wall_start = time.monotonic()
        outcomes = [_outcome(answer, seconds) for answer in answers]
        return [*outcomes, broken] if broken and outcomes[-1]["status"] == "ok" else outcomes


def _outcome(answer: dict[str, Any], seconds: float) -> dict[str, Any]:
    raised, own = answer.get("raised"), answer.get("own")
    if isinstance(raised, dict):
        return {"status": "exception", "cpu": seconds, "detail": str(raised)[:1000]}
    own = own if isinstance(own, (int, float)) else 0.0
    return {"status": "ok", "cpu": seconds, "value": str(answer.get("value")), "own": own}
