"""The files of an evaluation under way: streamed line by line, read again after a kill.

OUT gets ``settings.json`` first; ``predictions.jsonl`` grows by a line for each finished response
and is written anew, a graded row for each problem, when a task is done; ``summary.partial.json``
holds the rows of the tasks that are done and becomes ``summary.json`` at the end. An evaluation
that goes on after its end, because a task that was skipped can be graded now, has it back.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from evaluation.reporting.results import SUMMARY, read_summary
from evaluation.reporting.summary import is_waiting
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.writing import check_place, json_line, sync, write_json, write_jsonl

PREDICTIONS, SETTINGS, PARTIAL = "predictions.jsonl", "settings.json", "summary.partial.json"
VERDICTS = "graded.partial.jsonl"  # of a task whose grading is under way (verdicts.py)
LAYOUT = ("tp", "pp", "ep")  # results do not depend on it: another one may go on
_SYNC_SECONDS = 5.0  # between flushes to the disk

# What a line says of each of its responses, one entry a response.
PER_RESPONSE = (
    "responses",
    "response_ids",
    "committed_at",
    "forwards",
    "passes",
    "finish_reason",
)

Row = dict[str, Any]


def finished_rows(out: Path, settings: Row) -> list[Row] | None:
    """What is in --out: None for a new, empty or unfinished evaluation of these settings, its
    summary rows for a finished one.

    InputError for a file, for other files, and for an evaluation with other settings.
    """
    check_place(out, f"--out {out}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a directory")
    # Another rank may be writing the first file at this moment.
    if not out.is_dir() or all(file.suffix == ".tmp" for file in out.iterdir()):
        return None
    if not (out / SETTINGS).is_file():
        raise InputError(f"--out {out}: exists and is not empty; choose another name or remove it")
    differing = _differing(_read_object(out / SETTINGS), json.loads(json.dumps(settings)))
    if differing:
        raise InputError(
            f"--out {out}: holds an evaluation that differs in {', '.join(differing)}; choose "
            "another name, or give the same settings to go on with it"
        )
    return read_summary(out / SUMMARY) if (out / SUMMARY).is_file() else None


def _differing(found: Row, wanted: Row) -> list[str]:
    keys = [key for key in {**wanted, **found} if key not in LAYOUT]
    return [key for key in keys if found.get(key) != wanted.get(key)]


def _read_object(path: Path) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); remove its directory") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__}, not settings; remove its directory")
    return value


class Predictions:
    """Responses by task, problem and sample, in memory and, with a directory, on disk. Lives on the
    writer; the other ranks hold an empty one.
    """

    def __init__(self, out: Path | None = None, settings: Row | None = None) -> None:
        self.out, self._stream, self._synced = out, None, time.monotonic()
        self._lines: dict[str, dict[int, dict[int, Row]]] = {}
        self._rows: dict[str, list[Row]] = {}  # graded
        self.summaries: dict[str, Row] = {}
        self._before: dict[str, float] = {}  # seconds of tasks whose end was not kept
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / SETTINGS, settings or {})
            self._read_back(out)

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def samples(self, task: str) -> set[tuple[int, int]]:
        """(problem, sample) of the finished responses."""
        found = self._lines.get(task, {})
        return {(index, sample) for index, lines in found.items() for sample in lines}

    def seconds(self, task: str) -> float:
        """Time that the finished responses of a task took, over all attempts."""
        lines = [line for own in self._lines.get(task, {}).values() for line in own.values()]
        return max([self._before.get(task, 0.0), *(line.get("seconds", 0.0) for line in lines)])

    def add(self, task: str, index: int, sample: int, line: Row) -> None:
        """A response has ended. ``line`` has ``prompt`` and the lists of ``PER_RESPONSE``."""
        line = {"task": task, "index": index, "sample": sample, **line}
        self._lines.setdefault(task, {}).setdefault(index, {})[sample] = line
        if self.out is not None:
            self._append(json_line(line))

    def rows(self, task: str) -> list[Row]:
        """One row a problem, in the data file's order; its lists hold one entry a sample."""
        return [_merged(lines) for _, lines in sorted(self._lines.get(task, {}).items())]

    def finish(self, task: str, rows: list[Row], summary: Row) -> None:
        """A task is graded: ``rows`` replace its lines. The summary is written first: graded rows
        no longer say how long they took.
        """
        self._rows[task], self.summaries[task] = rows, summary
        self._lines.pop(task, None)
        if self.out is None:
            return
        self._close()
        write_json(self.out / PARTIAL, list(self.summaries.values()))
        self._rewrite()

    def publish(self, tasks: Iterable[str], summaries: list[Row]) -> list[Row]:
        """All is done: ``summary.json`` appears last. All rows, in the order of ``tasks``."""
        self._close()
        self._rows = {task: self._rows[task] for task in tasks if task in self._rows}
        if self.out is not None:
            self._rewrite()
            write_json(self.out / PARTIAL, summaries)
            (self.out / PARTIAL).replace(self.out / SUMMARY)
            (self.out / VERDICTS).unlink(missing_ok=True)
            sync(self.out)
        return [row for rows in self._rows.values() for row in rows]

    def _read_back(self, out: Path) -> None:
        """Take over what an earlier attempt finished."""
        summary = next((out / name for name in (SUMMARY, PARTIAL) if (out / name).is_file()), None)
        known = read_summary(summary) if summary is not None else []
        self.summaries = {row["task"]: row for row in known if not is_waiting(row)}
        for row in whole_lines(out / PREDICTIONS, _is_prediction, _NO_PREDICTION):
            task, index = row["task"], row["index"]
            if "sample" in row and task in self.summaries:  # killed before its lines were replaced
                self._before[task] = self.summaries.pop(task)["seconds"]
            if task in self.summaries:
                self._rows.setdefault(task, []).append(row)
                continue
            own = self._lines.setdefault(task, {}).setdefault(index, {})
            own.update(_split(row))
        if summary == out / SUMMARY:
            write_json(out / PARTIAL, list(self.summaries.values()))
            (out / SUMMARY).unlink()

    def _append(self, line: bytes) -> None:
        if self._stream is None:
            assert self.out is not None
            self._stream = (self.out / PREDICTIONS).open("ab")
        self._stream.write(line)
        self._stream.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def _close(self) -> None:
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def _rewrite(self) -> None:
        """Graded rows, then the lines of tasks that are not done; whole or not at all."""
        assert self.out is not None
        graded = chain.from_iterable(self._rows.values())
        lines = (
            line
            for found in self._lines.values()
            for one in found.values()
            for line in one.values()
        )
        write_jsonl(self.out / PREDICTIONS, chain(graded, lines))


def whole_lines(path: Path, is_ours: Callable[[Any], bool], rule: str) -> list[Row]:
    """Every row of a file under way; a last line that a kill tore is cut off the file.

    InputError (``rule``: what a line must be; remedy) for any other that is not ours.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not is_ours(row):
            raise InputError(f"{path}: line {number}: {rule}")
        rows.append(row)
    return rows


_NO_PREDICTION = (
    "not a prediction of evaluation.run; remove the line, and its responses are generated again"
)


def _is_prediction(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("task"), str)
        and type(row.get("index")) is int
        and all(isinstance(row.get(key), list) for key in PER_RESPONSE)
        and len({len(row[key]) for key in PER_RESPONSE}) == 1
    )


def _split(row: Row) -> dict[int, Row]:
    """A streamed line, or a graded row, as a line for each sample."""
    if "sample" in row:
        return {row["sample"]: row}
    common = {key: row[key] for key in ("task", "index", "prompt")}
    return {
        sample: {**common, "sample": sample, **{key: [row[key][sample]] for key in PER_RESPONSE}}
        for sample in range(len(row["responses"]))
    }


def _merged(lines: dict[int, Row]) -> Row:
    ordered = [line for _, line in sorted(lines.items())]
    first = {key: ordered[0][key] for key in ("task", "index", "prompt")}
    return first | {key: [item for line in ordered for item in line[key]] for key in PER_RESPONSE}
