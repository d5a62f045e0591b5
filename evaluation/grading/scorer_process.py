"""Scorers in child processes: each call has a hard limit, after which its whole group is killed.

A child reads a scorer's name, a row and a response a line and answers with a score or an error;
what the scorer prints is thrown away. Run as ``python -m evaluation.grading.scorer_process FD``, FD
being the pipe that the answers go to.
"""

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

START_SECONDS = 120  # for a child's first imports, on a busy machine


@dataclass(frozen=True, kw_only=True)
class Job:
    """One response to score."""

    row: dict[str, Any]
    response: str
    seconds: float  # limit
    scorer: str  # "module:function" of (row, response), whose value is plain JSON


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a scorer said, or why it said nothing."""

    score: Any  # what the scorer returned: a number between 0 and 1, or a verdict; 0.0 on an error
    error: str | None = None  # e.g. "timeout", or the name of the exception


class ScorerProcess:
    """One child, started when it is needed and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1  # read end of the pipe
        self._directory = tempfile.TemporaryDirectory(prefix="scorer-")

    def score(self, job: Job) -> Outcome:
        """Score one response. A child that dies or takes too long costs this response only."""
        process = self._started()
        if process is None:
            return Outcome(score=0.0, error="not started")
        assert process.stdin is not None
        asked = {"scorer": job.scorer, "row": job.row, "response": job.response}
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return Outcome(score=0.0, error="died")
        line = _line(self._answers, job.seconds)
        if line is None:
            self._kill()
            return Outcome(score=0.0, error="timeout")
        if not line:
            self._kill()
            return Outcome(score=0.0, error="died")
        answer = json.loads(line)
        return Outcome(score=answer["score"], error=answer["error"])

    def close(self) -> None:
        self._kill()
        self._directory.cleanup()

    def _started(self) -> "subprocess.Popen[bytes] | None":
        if self._process is not None:
            return self._process
        self._answers, write_end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.grading.scorer_process", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
            cwd=self._directory.name,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
            start_new_session=True,
        )
        os.close(write_end)
        if not _line(self._answers, START_SECONDS):  # "ready": limits begin now
            self._kill()
        return self._process

    def _kill(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        os.close(self._answers)
        self._process = None


def score_all(jobs: list[Job], workers: int) -> list[Outcome]:
    """Score every job, ``workers`` at a time, in their order."""
    if not jobs:
        return []
    idle: SimpleQueue[ScorerProcess] = SimpleQueue()
    children = [ScorerProcess() for _ in range(min(workers, len(jobs)))]
    for child in children:
        idle.put(child)

    def run(job: Job) -> Outcome:
        child = idle.get()
        try:
            return child.score(job)
        finally:
            idle.put(child)

    try:
        with ThreadPoolExecutor(len(children)) as pool:
            return list(pool.map(run, jobs))
    finally:
        for child in children:
            child.close()


def _line(descriptor: int, seconds: float) -> bytes | None:
    """One line from a pipe: empty when its writers are gone, None after ``seconds`` in silence."""
    with closing(selectors.DefaultSelector()) as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        read = b""
        while not read.endswith(b"\n"):
            if not selector.select(seconds):
                return None
            part = os.read(descriptor, 4096)
            if not part:
                return b""
            read += part
        return read


def _answers(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The child's work: one answer a job."""
    for line in lines:
        job = json.loads(line)
        try:
            module, _, function = job["scorer"].partition(":")
            scorer = getattr(importlib.import_module(module), function)
            score, error = scorer(job["row"], job["response"]), None
        except Exception as failure:  # whatever a scorer raises is its verdict: no score, and why
            score, error = 0.0, type(failure).__name__
        yield {"score": score, "error": error}


def _serve(descriptor: int) -> None:
    with os.fdopen(descriptor, "wb", buffering=0) as out:
        out.write(b"ready\n")
        for answer in _answers(iter(sys.stdin.buffer.readline, b"")):
            out.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
