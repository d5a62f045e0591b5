"""Every rank knows within ``distributed.timeout_seconds`` that another one died or hangs, and which
one, in which phase; then all of them end.

A collective cannot tell: it waits, or fails with an address. So each rank has a thread with a
connection to rank 0 over which both say once a second what they are doing. A connection that ends
is a death, one that stays silent a hung process or machine, and a rank whose own main thread gets
nowhere, without waiting for others in a collective, accuses itself; where such a wait cannot be
seen, rank 0 judges (``blame.py``). Whatever rank 0 learns, it tells all. Requests to stop
(``preemption.py``) travel the same way, and so does the news that a rank has followed one before
the first step. Rank 0 listens only until the others are connected.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_opdlm.errors import FAILURE, STOPPED, report_failure, report_stop
from megatron_opdlm.supervision import activity, preemption
from megatron_opdlm.supervision.blame import Calls, Stuck, described, to_blame
from megatron_opdlm.supervision.rank_connections import connect

# The watchdog speaks before the collectives' own time-outs, which know less.
_PATIENCE = 0.75  # of timeout_seconds
_BEAT_SECONDS = 1.0  # at most
_GRACE_SECONDS = 5.0  # at most, in which the main thread may end the process in good order
# Python files whose frames mean that a rank waits for others.
_WAITING = (
    "torch/distributed/distributed_c10d.py",
    "megatron_opdlm/parallel.py",
    "megatron_opdlm/hardware/buffer_exchange.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)
_INNERMOST = 3  # frames looked at
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Verdict:
    """What ends this rank's run, found out elsewhere."""

    text: str = ""  # empty: nothing is known
    is_stop: bool = False  # a rank was asked to stop and has left, nothing is wrong


@dataclass
class _Peer:
    """The other end of a connection."""

    connection: Connection
    heard: float = field(default_factory=time.monotonic)
    doing: str = f"phase {activity.SET_UP}"
    stuck: Stuck | None = None
    calls: Calls | None = None


class Watchdog:
    """This rank's thread. ``peers``: on rank 0 all others, on the others rank 0. ``calls`` counts
    this rank's collective calls, where a wait for others in one cannot be seen.
    """

    def __init__(
        self,
        rank: int,
        connections: dict[int, Connection],
        timeout_seconds: float,
        calls: Callable[[], Calls] | None = None,
    ):
        self.rank, self.timeout, self.calls = rank, timeout_seconds, calls
        self.patience = _PATIENCE * timeout_seconds
        self.beat = min(_BEAT_SECONDS, self.patience / 10)
        self.grace = min(_GRACE_SECONDS, (timeout_seconds - self.patience) / 2)
        self.peers = {other: _Peer(connection) for other, connection in connections.items()}
        self._sending = threading.Lock()
        self._found = threading.Event()
        self._ended, self._ending = Pipe(duplex=False)
        self._verdict, self._deadline = Verdict(), float("inf")
        self._stop_sent = False
        # Only an elastic launcher is a parent whose death means something.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Take leave of the others and end the thread."""
        self._ending.close()
        self._thread.join()
        self._tell("bye")
        self.close()

    def close(self) -> None:
        """Drop the connections without a word."""
        for connection in (self._ended, *(peer.connection for peer in self.peers.values())):
            connection.close()
        self.peers = {}

    def say(self) -> None:
        """Tell the others what this rank is doing."""
        known: dict[str, Any] = {}
        if self.calls is not None:
            stuck = self._stuck()
            known = {"stuck": stuck and stuck.to_json(), "calls": self.calls()}
        self._tell("beat", doing=str(activity.current()), **known)

    def fail(self, message: str) -> None:
        """Tell the others that this rank ends with an error, unless they know of another."""
        if not self._found.is_set():
            text = f"rank {self.rank} failed in {activity.current()}: {message}"
            self._tell("failed", text=text)

    def leave(self) -> None:
        """Tell the others that this rank was asked to stop and does, before the first step."""
        if not self._found.is_set():
            self._tell("left", text=str(preemption.stop_in_set_up(self.rank)))

    def verdict(self, seconds: float = 0.0) -> Verdict:
        """What is known to have ended the run elsewhere, waiting for it."""
        self._found.wait(min(seconds, self.grace))
        return self._verdict

    def _run(self) -> None:
        last = time.monotonic()
        while self._listen():
            now = time.monotonic()
            self._forgive(now - last - self.beat)
            last = now
            self.say()
            self._pass_requests_on()
            self._look_around()
            if time.monotonic() > self._deadline:
                report = report_stop if self._verdict.is_stop else report_failure
                report(self._verdict.text)
                os._exit(STOPPED if self._verdict.is_stop else FAILURE)

    def _listen(self) -> bool:
        """Take the messages of one beat; False once the watch has ended."""
        until = time.monotonic() + self.beat
        while (left := until - time.monotonic()) > 0:
            known = {peer.connection: rank for rank, peer in self.peers.items()}
            for connection in wait([self._ended, *known], left):
                if connection is self._ended:
                    return False
                assert isinstance(connection, Connection)
                self._read(known[connection])
        return True

    def _read(self, rank: int) -> None:
        peer = self.peers[rank]
        try:
            message = json.loads(peer.connection.recv_bytes())
        except (EOFError, OSError):
            del self.peers[rank]
            self._condemn(
                f"rank {rank} has died in {peer.doing}; its own output or the machine's log (out "
                "of memory?) says why. The same command continues from the newest checkpoint"
            )
            return
        peer.heard = time.monotonic()
        if message["kind"] == "beat":
            peer.doing = message["doing"]
            peer.stuck = Stuck.from_json(message.get("stuck"))
            peer.calls = message.get("calls")
        elif message["kind"] == "stop":
            preemption.request(message["text"])
        elif message["kind"] == "failed":
            self._condemn(message["text"])
        elif message["kind"] == "left":
            self._condemn(message["text"], is_stop=True)
        else:
            del self.peers[rank]

    def _forgive(self, gap: float) -> None:
        """This process itself was stopped: what it did not hear meanwhile says nothing."""
        if gap > self.patience / 2:
            activity.advance()
            for peer in self.peers.values():
                peer.heard += gap

    def _look_around(self) -> None:
        now = time.monotonic()
        for rank, peer in list(self.peers.items()):
            if now - peer.heard > self.patience:
                self._condemn(
                    f"rank {rank} has not been heard of for {now - peer.heard:.0f} s, in "
                    f"{peer.doing}: its process or machine hangs or cannot be reached "
                    f"(distributed.timeout_seconds={self.timeout:g}). Once it is away, the same "
                    "command continues from the newest checkpoint"
                )
        stuck = {rank: peer.stuck for rank, peer in self.peers.items() if peer.stuck is not None}
        if (own := self._stuck()) is not None:
            stuck[self.rank] = own
        blamed = self._to_blame(stuck)
        if blamed:
            self._condemn(
                f"{described(blamed, stuck)} (distributed.timeout_seconds={self.timeout:g}). The "
                "same command continues from the newest checkpoint; raise the key if the work "
                "takes longer"
            )

    def _stuck(self) -> Stuck | None:
        """Whether this rank gets nowhere and is not seen to wait for others."""
        doing = activity.current()
        if doing.phase == activity.SET_UP or doing.idle_seconds < self.patience:
            return None
        waiting, place = main_thread()
        return None if waiting else Stuck(doing.idle_seconds, str(doing), place)

    def _to_blame(self, stuck: dict[int, Stuck]) -> list[int]:
        """Where waits are seen this rank alone, if it is stuck; else rank 0 judges all."""
        if self.calls is None:
            return [self.rank] if self.rank in stuck else []
        calls = {rank: peer.calls for rank, peer in self.peers.items()}
        calls[self.rank] = self.calls()
        known = {rank: made for rank, made in calls.items() if made is not None}
        if self.rank > 0 or len(known) < len(calls):
            return []
        return to_blame(stuck, known)

    def _pass_requests_on(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            preemption.request("the death of its launcher")
        if preemption.requested() and not self._stop_sent:
            self._stop_sent = True
            self._tell("stop", text=preemption.reason())

    def _condemn(self, text: str, *, is_stop: bool = False) -> None:
        """The run is over: all shall know, and the main thread may still end in good order."""
        if self._found.is_set():
            return
        self._verdict = Verdict(text, is_stop)
        self._deadline = time.monotonic() + self.grace
        self._found.set()
        self._tell("left" if is_stop else "failed", text=text)

    def _tell(self, kind: str, **content: Any) -> None:
        """Send to all; who has been silent is not sent to, its buffers may be full."""
        message = json.dumps({"kind": kind, **content}).encode()
        now = time.monotonic()
        with self._sending:
            for peer in list(self.peers.values()):
                if now - peer.heard < max(self.patience / 2, 3 * self.beat):
                    try:
                        peer.connection.send_bytes(message)
                    except OSError:
                        continue  # it has left: reading says so, and how


def main_thread() -> tuple[bool, str]:
    """Whether the main thread waits for other ranks, and its innermost place in this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    files, place, found = [], "an unknown place", False
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        files.append(file.as_posix())
        if not found and file.is_relative_to(_PACKAGE):
            place, found = _describe(frame, file), True
        frame = frame.f_back
    waiting = any(file.endswith(_WAITING) for file in files[:_INNERMOST])
    return waiting, place


def _describe(frame: FrameType, file: Path) -> str:
    return f"{file.relative_to(_PACKAGE.parent)}:{frame.f_lineno} ({frame.f_code.co_name})"


_current: Watchdog | None = None


def start(
    timeout_seconds: float,
    share: Callable[[Any], Any],
    calls: Callable[[], Calls] | None = None,
) -> None:
    """Watch from now on; all ranks together. ``share`` gives rank 0's value to all of them;
    ``calls``: see ``Watchdog``.
    """
    global _current
    stop()
    rank = dist.get_rank()
    connections = connect(rank, dist.get_world_size(), timeout_seconds, share)
    _current = Watchdog(rank, connections, timeout_seconds, calls)
    _current.start()


def stop() -> None:
    """End the watch in good order; nothing where there is none."""
    global _current
    ending, _current = _current, None
    if ending is not None:
        ending.stop()


def enter(phase: str, step: int) -> None:
    """Begin a phase, and say so at once: a death is named with the phase it came in."""
    activity.enter(phase, step)
    if _current is not None:
        _current.say()


def fail(message: str) -> None:
    """Tell the other ranks that this one ends with an error."""
    if _current is not None:
        _current.fail(message)


def leave() -> None:
    """Tell the other ranks that this one follows a request to stop before the first step."""
    if _current is not None:
        _current.leave()


def verdict(*, wait: bool) -> Verdict:
    """What is known to have ended the run on another rank, waiting a moment for it."""
    return Verdict() if _current is None else _current.verdict(_GRACE_SECONDS if wait else 0.0)


def _forget_in_child() -> None:
    """A forked child must not keep the connections open: their end is how a death is known."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


os.register_at_fork(after_in_child=_forget_in_child)
