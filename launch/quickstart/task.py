"""The toy reasoning task: addition of two numbers below 100, column by column with carries.

    prompt    57+68=
    response  7+8+0=15,5+6+1=12,#125

Each column reads ``digit + digit + carry = sum``, units first; the number after ``#`` is the
answer. All 10,000 problems can be listed. A hash of the prompt alone puts each into one split, so
the splits are disjoint, free of repeats and the same on every machine: ``test`` is exhaustive
(every problem of that split), ``validation`` is for stopping rules and choices.
"""

import hashlib
from pathlib import Path

from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import write_jsonl

LARGEST = 99  # operands are 0..99
ANSWER_MARKER = "#"
ALPHABET = "0123456789+=,#"  # every character of prompts and responses
MAX_RESPONSE_TOKENS = 23  # "9+9+0=18,9+9+1=19,#198" and the end token

# Of 100 hash buckets: 8 for the test set (about 800 problems), 3 for validation (about 300), the
# rest trains.
_BUCKETS = 100
_TEST_BUCKETS = range(0, 8)
_VALIDATION_BUCKETS = range(8, 11)

Problem = tuple[int, int]
SPLITS = ("train", "validation", "test")
# `addition.jsonl` is the file that the evaluation task "addition" reads.
FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "addition.jsonl"}


def prompt(problem: Problem) -> str:
    """``(57, 68)`` -> ``"57+68="``."""
    return f"{problem[0]}+{problem[1]}="


def response(problem: Problem) -> str:
    """``(57, 68)`` -> ``"7+8+0=15,5+6+1=12,#125"``, without the end token."""
    a, b = problem
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    columns = f"{a % 10}+{b % 10}+0={units},{a // 10}+{b // 10}+{carry}={tens},"
    return f"{columns}{ANSWER_MARKER}{answer(problem)}"


def answer(problem: Problem) -> str:
    return str(problem[0] + problem[1])


def split_of(problem: Problem) -> str:
    """The split of a problem: a pure function of its prompt."""
    bucket = int.from_bytes(hashlib.sha256(prompt(problem).encode()).digest()[:8], "big") % _BUCKETS
    if bucket in _TEST_BUCKETS:
        return "test"
    return "validation" if bucket in _VALIDATION_BUCKETS else "train"


def problems(split: str) -> list[Problem]:
    """Every problem of one split, in numerical order, each once."""
    assert split in SPLITS, split
    numbers = range(LARGEST + 1)
    return [(a, b) for a in numbers for b in numbers if split_of((a, b)) == split]


def write_data(out: Path) -> dict[str, int]:
    """Write the three files of ``FILES`` into ``out``; returns the problems of each split.

    A row is ``{"question", "response", "answer"}``. Distillation does not read the responses.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, name in FILES.items():
        rows = [
            {"question": prompt(p), "response": response(p), "answer": answer(p)}
            for p in problems(split)
        ]
        write_jsonl(out / name, rows)
        counts[split] = len(rows)
    return counts


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="directory for the three files")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: is a file, a directory is needed; choose another name")
    counts = write_data(args.out)
    print(
        f"data: {counts['train']} training prompts, "
        f"{counts['test']} held-out problems -> {args.out}"
    )


if __name__ == "__main__":
    command(main)
