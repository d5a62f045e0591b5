"""Runs programs on the grader's request: the work of the trusted process inside a jail. Standard
library only, as all that runs there.
"""

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from evaluation.jail import channel, isolation, judge, program
from evaluation.jail.batch import Batch
from evaluation.jail.child import (
    Cell,
    Child,
    SetUpFailed,
    close,
    ending,
    fresh_interpreter,
    process_descriptors,
)
from evaluation.jail.remote import Remote

FRAME_LIMIT = 1 << 30  # from the grader, who is trusted
_POLL_SECONDS = 0.05


class Driver:
    """One jail: a program is loaded, then run on inputs, called, or tested."""

    def __init__(self, control: int, settings: dict[str, Any], layers: set[str]) -> None:
        self.control = control
        self.cell = Cell(
            limits=isolation.Limits(**settings["limits"]),
            layers=layers,
            trees=settings["trees"],
            work=settings["work"],
        )
        self.packages: list[str] = settings["packages"]
        self.source = ""
        self.server: Child | None = None
        self.ends: tuple[int, ...] = ()  # requests to, replies from the server
        self.has_held_tests = False
        self.null = os.open(os.devnull, os.O_RDWR)

    def loop(self) -> None:
        """Serve the grader until it closes the channel."""
        while True:
            try:
                request = channel.receive(self.control, limit=FRAME_LIMIT)
            except channel.ChannelClosed:
                return
            try:
                reply = _REQUESTS[request["do"]](self, request)
            except SetUpFailed as error:
                reply = {"status": "sandbox_failed", "detail": str(error)}
            channel.send(self.control, reply)

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        self.stop()
        self.source = request["source"]
        return {"status": "ok"}

    def stop(self) -> None:
        """End the serving process and close the channels to it."""
        if self.server is not None:
            self.server.kill()
            self.server = None
        self._let_go()
        self.sweep()

    def _let_go(self) -> None:
        close(self.ends)
        self.ends = ()

    def leave_if_abandoned(self) -> None:
        """End, and with us every program, when the grader has gone."""
        poll = select.poll()
        poll.register(self.control, 0)  # hang-ups are reported unasked
        if poll.poll(0):
            os._exit(1)

    def sweep(self) -> None:
        """End what programs left behind: we are the first process of our pid namespace."""
        if "pid_namespace" in self.cell.layers and os.getpid() == 1:
            try:
                os.kill(-1, signal.SIGKILL)
                while True:
                    os.waitpid(-1, 0)
            except (ProcessLookupError, ChildProcessError):
                return

    def require_no_tests(self) -> None:
        """A fork copies this process' memory: no program may get one that has held its tests."""
        if self.has_held_tests:
            raise SetUpFailed("this jail has held tests; open another for another run")

    # One run of a program that reads standard input and prints.

    def stdio(self, request: dict[str, Any]) -> dict[str, Any]:
        self.stop()
        self.require_no_tests()
        given = os.memfd_create("input")
        with open(given, "wb", closefd=False) as file:
            file.write(request["stdin"].encode(errors="surrogateescape"))
        os.lseek(given, 0, os.SEEK_SET)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()

        def body() -> int:
            fresh_interpreter(self.packages)
            if not request["prompts"]:
                program.silence_prompts()
            return program.run_as_main(self.source)

        try:
            child = Child(self.cell, body, {0: given, 1: out_end, 2: err_end})
        finally:
            close((given, out_end, err_end))
        child.limit_cpu(request["cpu"])
        texts = {out: bytearray(), err: bytearray()}
        over = self._watch([child], texts, request, lambda: child.reap() and not self._open)
        child.kill()
        self.sweep()
        over = over or ("cpu_time" if child.cpu() > request["cpu"] else None)
        status = over or ending(child.status)
        return {
            "status": status,
            "stdout": texts[out].decode(errors="replace"),
            "stderr": texts[err][-4000:].decode(errors="replace"),
            "cpu": child.cpu(),
        }

    _open: set[int]

    def _watch(
        self,
        children: list[Child],
        texts: dict[int, bytearray],
        request: dict[str, Any],
        finished: Callable[[], bool],
    ) -> str | None:
        """Collect what is written until ``finished``; the name of a limit that was passed."""
        poll = select.poll()
        self._open = set(texts)
        for end in texts:
            poll.register(end, select.POLLIN)
        endings = process_descriptors(children)  # wake us when a process ends
        for end in endings:
            poll.register(end, select.POLLIN)
        over = None
        while over is None:
            left = request["cpu"] - max(child.cpu() for child in children)
            wait = min(_POLL_SECONDS, max(left, 0.002))
            self.leave_if_abandoned()
            for end, _ in poll.poll(wait * 1000):
                if end in endings:
                    poll.unregister(end)
                    continue
                data = os.read(end, 1 << 16)
                texts[end] += data
                if not data:
                    poll.unregister(end)
                    self._open.discard(end)
            if sum(map(len, texts.values())) > self.cell.limits.output:
                over = "output_limit"
            elif finished():
                break
            elif any(child.cpu() > request["cpu"] for child in children):
                over = "cpu_time"
            elif time.monotonic() - children[0].wall_start > request["wall"]:
                over = "wall_time"
            elif all(child.reap() for child in children) and not poll.poll(0):
                break  # a stray process holds a pipe open
        close([*texts, *endings])
        return over

    # Calls to a program's functions: values in, values out.

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        self.stop()
        child, requests, replies = self._serve(keeps_objects=False)
        self.server, self.ends = child, (requests, replies)
        os.set_blocking(replies, False)
        return self._exchange({"op": "load", "source": self.source}, request)

    def _serve(self, *, keeps_objects: bool) -> tuple[Child, int, int]:
        self.require_no_tests()
        (request_end, requests), (replies, reply_end) = os.pipe(), os.pipe()

        def body() -> int:
            fresh_interpreter(self.packages)
            program.Server(3, 4, keeps_objects).serve()
            return 0

        keep = {0: self.null, 1: self.null, 2: self.null, 3: request_end, 4: reply_end}
        try:
            return Child(self.cell, body, keep), requests, replies
        finally:
            close((request_end, reply_end))

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        names = {key: request[key] for key in ("name", "within") if key in request}
        return self._exchange({"op": "call", **names, "args": request["args"]}, request)

    def calls(self, request: dict[str, Any]) -> dict[str, Any]:
        """Many calls: the first replies; ``more`` hands on the others."""
        if self.server is None:
            return {"replies": [{"status": "ended", "cpu": 0.0}]}
        limit, (requests, replies) = self.cell.limits.output, self.ends
        self.batch = Batch(self.server, requests, replies, limit, request, self.leave_if_abandoned)
        return self.more(request)

    def more(self, request: dict[str, Any]) -> dict[str, Any]:
        found = self.batch.collect()
        if found and found[-1]["status"] not in ("ok", "exception"):
            self.stop()
        return {"replies": found}

    batch: Batch

    def _exchange(self, message: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        """One request to the server; it must answer once, with the request's secret, in time."""
        child = self.server
        if child is None:
            return {"status": "ended", "cpu": 0.0}
        secret = os.urandom(16).hex()
        child.restart_clock()
        child.limit_cpu(request["cpu"])
        reader = channel.FrameReader(self.cell.limits.output)
        try:
            status, answer = self._converse(child, {**message, "id": secret}, reader, request)
        except channel.ChannelClosed as error:
            status, answer = "broken_channel", {"detail": str(error)}
        if status == "ok" and (answer.pop("id", None) != secret or reader.buffer):
            status = "broken_channel"
        cpu = child.cpu()
        if status == "ok" and cpu > request["cpu"]:
            status = "cpu_time"
        if status != "ok":
            self.stop()
            return {"status": status, "cpu": cpu, "detail": str(answer.get("detail", ""))[:500]}
        raised = answer.get("raised")
        if isinstance(raised, dict):
            return {"status": "exception", "cpu": cpu, "detail": json.dumps(raised)[:1000]}
        return {"status": "ok", "cpu": cpu, "value": str(answer.get("value"))}

    def _converse(
        self, child: Child, message: dict[str, Any], reader: channel.FrameReader, request: Any
    ) -> tuple[str, dict[str, Any]]:
        requests, replies = self.ends
        poll = select.poll()
        poll.register(replies, select.POLLIN)
        if poll.poll(0):  # written ahead of the question, or the process has gone
            return "ended" if child.reap() else "broken_channel", {}
        channel.send(requests, message)
        while True:
            self.leave_if_abandoned()
            left = request["cpu"] - child.cpu()
            if poll.poll(min(_POLL_SECONDS, max(left, 0.002)) * 1000):
                data = os.read(replies, 1 << 20)
                if not data:
                    child.await_ending()
                    how = ending(child.status)
                    return "ended" if how == "ok" else how, {}
                reader.feed(data)
                answer = reader.frame()
                if answer is not None:
                    return "ok", answer
            elif child.cpu() > request["cpu"]:
                return "cpu_time", {}
            elif time.monotonic() - child.wall_start > request["wall"]:
                return "wall_time", {}

    # Test code in one process, the program in another.

    def stand_by(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the program's process, while there are no tests in this one to copy."""
        self.stop()
        self.server, *ends = self._serve(keeps_objects=True)
        self.ends = tuple(ends)
        return {"status": "ok"}

    def judge(self, request: dict[str, Any]) -> dict[str, Any]:
        self.has_held_tests = True
        server = self.server
        if server is None:
            raise SetUpFailed("tests came before the program's process was there")
        requests, replies = self.ends
        report, report_end = os.pipe()

        def body() -> int:
            fresh_interpreter(self.packages)
            verdict = judge.run(Remote(3, 4), self.source, request["tests"])
            channel.send(5, verdict)
            return 0

        keep = {0: self.null, 1: self.null, 2: self.null, 3: requests, 4: replies, 5: report_end}
        try:
            tester = Child(self.cell, body, keep)
        finally:
            close((report_end,))
            self._let_go()
        server.restart_clock()
        server.limit_cpu(request["cpu"])
        tester.limit_cpu(request["cpu"])
        texts = {report: bytearray()}
        over = self._watch([tester, server], texts, request, lambda: not self._open)
        used = server.cpu() + tester.cpu()
        tester.kill()
        self.stop()
        if over:
            return {"status": over, "cpu": used}
        reader = channel.FrameReader(self.cell.limits.output)
        reader.feed(bytes(texts[report]))
        verdict = reader.frame()
        if verdict is None or reader.buffer:
            return {"status": "broken_channel", "cpu": used}
        return {"status": "ok", "cpu": used, **verdict}


_REQUESTS: dict[str, Callable[[Driver, dict[str, Any]], dict[str, Any]]] = {
    "load": Driver.load,
    "stdio": Driver.stdio,
    "start": Driver.start,
    "call": Driver.call,
    "calls": Driver.calls,
    "more": Driver.more,
    "stand_by": Driver.stand_by,
    "judge": Driver.judge,
}
