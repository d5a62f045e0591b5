"""Fetch the data files of benchmarks.

    python -m evaluation.download --data DIR [--tasks NAME ...]
    python -m evaluation.download --data DIR --tasks NAME --from FILE

Without --tasks, all of the paper's. Files that are there already are left as they are. The
published files come from the paper's repositories on the Hugging Face Hub; Codeforces is prepared
from open-r1/codeforces, DAPO_Math_17k from DAPO's own file, each problem once. IFEval also gets
NLTK's sentence data (DIR/nltk_data), HumanEval and MBPP get EvalPlus' tests
(DIR/HumanEvalPlus.jsonl.gz, DIR/MbppPlus.jsonl.gz). DIR is all that grading needs: copy it to where
there is no network.

--from converts a benchmark's public file, as its authors publish it, where the paper's repository
is not to be had: GSM8K, MATH-500, HumanEval, MBPP (also EvalPlus' releases, whose wording and
choice of problems is taken where DIR has them), IFEval, MMLU. Nothing is fetched then.
"""

import gzip
import shutil
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from evaluation.grading.code_evalplus import (
    HUMANEVAL,
    MBPP,
    Source,
    cached,
    files_in,
    find_problems,
)
from evaluation.jsonl import read_rows
from evaluation.tasks import PAPER_TASKS, Task, get_task
from evaluation.tasks.codeforces_data import codeforces_rows
from evaluation.tasks.evalplus import EvalPlusTask
from evaluation.tasks.public_files import converted
from megatron_opdlm.data import sources
from megatron_opdlm.data.dapo import dapo_rows
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import check_place, replacing, write_bytes, write_json
from megatron_opdlm.reporting.progress import Progress

Result = TypeVar("Result")

_SILENCE_SECONDS = 60.0  # of a server, until it counts as out of reach
EVALUATION_DATA = "divelab/opdlm_eval_data"
TRAINING_DATA = "divelab/opdlm_train_data"

# Files of the Hub by the task's name; every other task of the paper is in EVALUATION_DATA.
_REPOSITORIES = {"opdlm_train": TRAINING_DATA, "MATH_train_traceRL": EVALUATION_DATA}


def fetch(task: Task, data: Path) -> str:
    """Fetch one task's files into ``data``; returns what was done, for people.

    InputError: the task has no published file. RunError: it cannot be had; with the remedy.
    """
    path = data / task.file
    done = "was there" if path.is_file() else _fetch_rows(task, path)
    rows = read_rows(path, f"task {task.name}:")
    extra = _EXTRAS.get(task.name)
    if extra is not None:
        _attempt(f"what {task.name} is graded with", lambda: extra(data))
    return f"{task.name}: {path.name} {done}, {len(rows)} rows"


def convert(task: Task, public: Path, data: Path) -> str:
    """Write a task's file into ``data`` from the public one; returns what was done, for people.

    InputError: the file is another one, or ``data`` has the task's file already.
    """
    path = data / task.file
    if path.exists():
        raise InputError(f"{path}: exists already; choose another --data or remove it")
    if task.name == "DAPO_Math_17k":
        rows = [row.fields for row in dapo_rows(public, "--from")]
    else:
        rows = converted(task.name, public)
    note = ""
    if isinstance(task, EvalPlusTask):
        problems, given = find_problems(task.source, data), len(rows)
        note = f"; EvalPlus' own file, which is not in {data}, may word and choose otherwise"
        if problems:
            rows = [row for row in rows if row["task_id"] in problems]
            rows = [row | {"question": problems[row["task_id"]]["prompt"]} for row in rows]
            note = f" of {given}: those of EvalPlus' {len(problems)} problems, in its wording"
    for number, row in enumerate(rows):
        problem = task.problem_of(row)
        if problem:
            raise InputError(f"--from {public}: row {number} converted: {problem}")
    if not rows:
        raise InputError(f"--from {public}: holds none of EvalPlus' problems; check the file")
    write_json(path, rows)
    return f"{task.name}: {path.name} converted, {len(rows)} rows{note}"


def _fetch_rows(task: Task, path: Path) -> str:
    if task.name == "DAPO_Math_17k":
        write_json(path, [row.fields for row in dapo_rows(sources.fetch("dapo"), "--source")])
        return "prepared"
    if task.name == "Codeforces":
        rows = _attempt("open-r1/codeforces", codeforces_rows)
        write_json(path, rows)
        return "prepared"
    repository = _REPOSITORIES.get(task.name)
    if repository is None and task.name not in PAPER_TASKS:
        raise InputError(f"task {task.name}: has no published file; {task.how_to_get}")
    _attempt(
        f"{task.file} of {repository or EVALUATION_DATA}",
        lambda: _fetch_file(repository or EVALUATION_DATA, path),
    )
    return "fetched"


def _fetch_file(repository: str, path: Path) -> None:
    """Through the Hub's cache, then copied under a temporary name: never half a file."""
    from huggingface_hub import hf_hub_download

    stored = hf_hub_download(repository, path.name, repo_type="dataset")
    with open(stored, "rb") as content, replacing(path) as out:
        shutil.copyfileobj(content, out)


def _fetch_sentence_data(data: Path) -> None:
    import nltk

    directory = data / "nltk_data"
    if not (directory / "tokenizers/punkt_tab/english").is_dir():
        nltk.download("punkt_tab", download_dir=str(directory), quiet=True, raise_on_error=True)


def _fetch_evalplus_tests(source: Source, data: Path) -> None:
    """The release's file, under a temporary name until it is whole; EvalPlus' cache serves, too."""
    if any(path.is_file() for path in files_in(source, data)):
        return
    if cached(source).is_file():
        write_bytes(data / f"{source.stem}.jsonl", cached(source).read_bytes())
        return
    with urllib.request.urlopen(source.url, timeout=_SILENCE_SECONDS) as answer:
        packed = answer.read()
    gzip.decompress(packed)  # raises where it is cut off or something else
    write_bytes(data / f"{source.stem}.jsonl.gz", packed)


_EXTRAS: dict[str, Callable[[Path], None]] = {
    "IFEval": _fetch_sentence_data,
    "HumanEval": partial(_fetch_evalplus_tests, HUMANEVAL),
    "MBPP": partial(_fetch_evalplus_tests, MBPP),
}


def _attempt(what: str, do: Callable[[], Result]) -> Result:
    """Clients of the network fail in many ways; each becomes one line with a remedy."""
    try:
        return do()
    except Exception as error:  # none of the clients documents what it raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"{what} cannot be fetched ({type(error).__name__}: {reason[:200]}); run this where "
            "there is a network, and copy the data directory"
        ) from error


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", default=list(PAPER_TASKS), metavar="NAME")
    parser.add_argument("--from", dest="public", type=Path, metavar="FILE", help="convert it")
    args = parser.parse_args()
    tasks = [get_task(name) for name in args.tasks]
    if args.public is not None and len(tasks) != 1:
        raise InputError(f"--from {args.public}: is one task's file; name that task with --tasks")
    check_place(args.data / "file", f"--data {args.data}")
    args.data.mkdir(parents=True, exist_ok=True)
    if args.public is not None:
        print(convert(tasks[0], args.public, args.data))
        return
    with Progress("download", len(tasks), show=True, unit="task") as progress:
        for task in tasks:
            print(fetch(task, args.data), flush=True)
            progress.advance()


if __name__ == "__main__":
    command(main)
