"""Benchmarks' files as their authors publish them, and their rows in the form of the paper's."""

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PublicForm:
    """Rows of a public file: the keys that tell them, and what the paper's file has for one."""

    keys: tuple[str, ...]
    convert: Callable[[Row], Row]

    def fits(self, row: Mapping[str, Any]) -> bool:
        return all(row.get(key) is not None for key in self.keys)


def _gsm8k(row: Row) -> Row:
    return _answered(row["question"], row["answer"].rpartition("####")[2].strip())


def _math(row: Row) -> Row:
    from evaluation.grading.mathematics import last_box  # sympy takes seconds to import

    answer = row.get("answer")
    return _answered(row["problem"], answer if answer is not None else last_box(row["solution"]))


def _answered(question: str, answer: str | None) -> Row:
    return {"question": question, "ground_truth_answer": answer}


def _program(row: Row) -> Row:
    kept = {key: row[key] for key in ("entry_point", "test", "canonical_solution") if key in row}
    return {"task_id": row["task_id"], "question": row["prompt"], **kept}


def _mbpp(row: Row) -> Row:
    """EvalPlus' wording: the task and its first test, in a docstring."""
    text = row.get("prompt") or row["text"]
    kept = {key: row[key] for key in ("test_setup_code", "test_imports") if row.get(key)}
    return {
        "task_id": f"Mbpp/{row['task_id']}",
        "question": f'"""\n{text}\n{row["test_list"][0]}\n"""\n',
        "test_list": row["test_list"],
        **kept,
    }


def _ifeval(row: Row) -> Row:
    kept = {key: row[key] for key in ("key", "instruction_id_list", "kwargs")}
    return {"question": row["prompt"], **kept}


def _mmlu(row: Row) -> Row:
    letter = row["answer"] if isinstance(row["answer"], str) else "ABCD"[row["answer"]]
    options = "\n".join(
        f"({name}) {text}" for name, text in zip("ABCD", row["choices"], strict=True)
    )
    subject = {"subdivision": row["subject"]} if row.get("subject") else {}
    return {**_answered(f"{row['question']}\n{options}", letter), **subject}


_FORMS: Mapping[str, tuple[PublicForm, ...]] = {
    "GSM8K": (PublicForm(keys=("question", "answer"), convert=_gsm8k),),
    "MATH-500": (PublicForm(keys=("problem", "solution"), convert=_math),),
    "HumanEval": (PublicForm(keys=("task_id", "prompt", "entry_point"), convert=_program),),
    "MBPP": (
        PublicForm(keys=("task_id", "prompt", "entry_point"), convert=_program),  # EvalPlus'
        PublicForm(keys=("task_id", "prompt", "test_list"), convert=_mbpp),  # sanitized
        PublicForm(keys=("task_id", "text", "test_list"), convert=_mbpp),
    ),
    "IFEval": (
        PublicForm(keys=("prompt", "key", "instruction_id_list", "kwargs"), convert=_ifeval),
    ),
    "MMLU": (PublicForm(keys=("question", "choices", "answer"), convert=_mmlu),),
}
CONVERTED = tuple(_FORMS)  # tasks whose public file can be converted


def form_of(task: str, row: Mapping[str, Any]) -> PublicForm | None:
    """Which public form of a task's rows this one has, if any."""
    return next((form for form in _FORMS.get(task, ()) if form.fits(row)), None)


def converted(task: str, path: Path) -> list[Row]:
    """The rows of a public file (.json, .jsonl, either with .gz, .parquet; MMLU's directory of .csv
    files) in the paper's form. InputError: file, row and rule.
    """
    if task not in _FORMS:
        raise InputError(
            f"task {task}: no public file of it is known; --from goes with {', '.join(CONVERTED)}"
        )
    rows = []
    for number, row in enumerate(_read(path)):
        form = form_of(task, row)
        try:
            if form is None:
                raise KeyError(f"it has the keys {', '.join(map(str, row))}")
            rows.append(form.convert(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"--from {path}: row {number} is not as in the public file of {task} ({error}); "
                "give the file that its authors publish"
            ) from error
    return rows


def _read(path: Path) -> list[Row]:
    if path.is_dir() and any(path.glob("*.csv")):
        return [row for file in sorted(path.glob("*.csv")) for row in _mmlu_csv(file)]
    if path.suffix != ".gz" or not path.is_file():
        return [row.fields for row in read_rows(path, "--from")]
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"--from {path}: not JSON in gzip ({error}); fetch it again") from error


def _mmlu_csv(path: Path) -> list[Row]:
    """Hendrycks' files: question, four options, letter; the file's name has the subject."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    wrong = next((number for number, row in enumerate(rows) if len(row) != 6), None)
    if wrong is not None:
        raise InputError(
            f"--from {path}: row {wrong} has {len(rows[wrong])} columns; MMLU's files have 6"
        )
    subject = path.stem.removesuffix("_test")
    return [
        {"question": row[0], "choices": row[1:5], "answer": row[5], "subject": subject}
        for row in rows
    ]
