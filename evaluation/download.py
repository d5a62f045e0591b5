"""Fetch the data files of benchmarks.

    python -m evaluation.download --data DIR [--tasks NAME ...]

Without --tasks, all of the paper's. Files that are there already are left as they are. The
published files come from the paper's repositories on the Hugging Face Hub; Codeforces is prepared
from open-r1/codeforces. IFEval also gets NLTK's sentence data (DIR/nltk_data), HumanEval and MBPP
get EvalPlus' tests (DIR/HumanEvalPlus.jsonl.gz, DIR/MbppPlus.jsonl.gz). DIR is all that grading
needs: copy it to where there is no network.
"""

import gzip
import shutil
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from evaluation.grading.code_evalplus import HUMANEVAL, MBPP, Source, cached, files_in
from evaluation.jsonl import read_rows
from evaluation.tasks import PAPER_TASKS, Task, get_task
from evaluation.tasks.codeforces_data import codeforces_rows
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import replacing, write_bytes, write_json

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


def _fetch_rows(task: Task, path: Path) -> str:
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
    args = parser.parse_args()
    tasks = [get_task(name) for name in args.tasks]
    args.data.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        print(fetch(task, args.data), flush=True)


if __name__ == "__main__":
    command(main)
