"""A published or local training set -> a checked JSONL file that training reads.

    python -m megatron_opdlm.prepare_data --source opdlm_train --tokenizer HF_DIR --out FILE.jsonl
        [--evaluation-data DIR]

Every row is validated: its schema, its length with the real tokenizer, repetitions, and overlap
with the evaluation data by n-grams. Prints what it found; writes FILE.jsonl and
FILE.jsonl.manifest.json with the content's SHA-256, which a run records. docs/data.md
"""

import argparse
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.data.chat import with_messages
from megatron_opdlm.data.checks import (
    MANIFEST,
    EvaluationProblems,
    Identity,
    duplicates,
    evaluation_files,
    question_of,
)
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.data.dapo import dapo_rows, is_dapo
from megatron_opdlm.data.rows import Row, read_rows
from megatron_opdlm.data.sources import PUBLISHED, TEMPLATES, Published, ask, fetch, published_as
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_outside, check_place, write_json, write_jsonl
from megatron_opdlm.prompts import check_vocabulary, render
from megatron_opdlm.reporting.progress import Progress

_SHOWN = 3  # faulty rows named in an error


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What rows are held against, and what becomes of those that do not pass."""

    tokenizer: Any
    vocab_size: int
    enable_thinking: bool
    max_prompt_tokens: int | None
    problems: EvaluationProblems | None
    keep_duplicates: bool
    keep_overlap: bool
    drop_invalid: bool


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The rows that passed, and the account of all of them."""

    rows: list[dict[str, Any]]
    account: dict[str, Any]


def as_training_row(fields: dict[str, Any], template: str) -> dict[str, Any]:
    """The row with its question as the model is asked it, a chat as messages; other keys as they
    are. InputError for keys of another type than text.
    """
    fields = with_messages(fields)
    for key in ("domain", "response"):
        if key in fields and not isinstance(fields[key], str):
            raise InputError(f"{key} must be text, not {type(fields[key]).__name__}")
    if "question" not in fields or template == "none":
        return fields
    question, domain = fields["question"], fields.get("domain")
    if not isinstance(question, str) or not question.strip():
        raise InputError("question must be text that is not empty")
    return {**fields, "question": ask(question, domain, template)}


def prepare(rows: list[Row], template: str, checks: Checks) -> Prepared:
    """Check every row. InputError with line numbers unless faulty rows are to be dropped."""
    good: list[tuple[Row, dict[str, Any], int]] = []
    faults: list[str] = []
    with Progress("prepare", len(rows), show=True, unit="row") as progress:
        for row in rows:
            try:
                fields = as_training_row(row.fields, template)
                good.append((row, fields, _tokens(fields, checks)))
            except InputError as error:
                faults.append(f"{row.place}: {error}")
            progress.advance()
    if faults and not checks.drop_invalid:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(
            f"{len(faults)} of {len(rows)} rows are faulty: {'; '.join(faults[:_SHOWN])}{more}; "
            "correct them or use --drop-invalid"
        )
    dropped: dict[str, int] = {"faulty": len(faults)}
    limit = checks.max_prompt_tokens
    short = [item for item in good if limit is None or item[2] <= limit]
    dropped["too_long"] = len(good) - len(short)
    exact, normalised = duplicates([Identity.of(fields) for _, fields, _ in short])
    repeated = set() if checks.keep_duplicates else {*exact, *normalised}
    overlap = _overlap([row for row, _, _ in short], checks.problems)
    foreign = set() if checks.keep_overlap else set(overlap)
    kept = [item for place, item in enumerate(short) if place not in repeated | foreign]
    dropped |= {"repeated": len(repeated), "in_evaluation_data": len(foreign - repeated)}
    if not kept:
        raise InputError(f"no row of {len(rows)} is left: dropped {dropped}; see --help")
    account = {
        "rows_read": len(rows),
        "rows": len(kept),
        "dropped": dropped,
        "repeated_exactly": len(exact),
        "repeated_normalised": len(normalised),
        "overlap_by_file": dict(Counter(overlap.values())),
        "not_compared": checks.problems.passed_over if checks.problems else [],
        "domains": dict(Counter(str(fields.get("domain")) for _, fields, _ in kept)),
        "prompt_tokens": _spread([tokens for _, _, tokens in kept]),
    }
    return Prepared(rows=[fields for _, fields, _ in kept], account=account)


def _tokens(fields: dict[str, Any], checks: Checks) -> int:
    """Length of the rendered prompt; InputError where the row is no training row."""
    ids = render(fields, checks.tokenizer, checks.enable_thinking)
    check_vocabulary(ids, checks.vocab_size)
    if not ids:
        raise InputError("the prompt is empty")
    return len(ids)


def _overlap(rows: list[Row], problems: EvaluationProblems | None) -> dict[int, str]:
    """Place -> evaluation file, of the rows (as they came, without templates) that overlap."""
    if problems is None:
        return {}
    found = ((place, problems.file_of(question_of(row.fields))) for place, row in enumerate(rows))
    return {place: file for place, file in found if file is not None}


def _spread(lengths: list[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    return {
        "mean": round(sum(ordered) / len(ordered), 1),
        "median": ordered[len(ordered) // 2],
        "p99": ordered[int(len(ordered) * 0.99)],
        "max": ordered[-1],
    }


def write(prepared: Prepared, out: Path, about: dict[str, Any]) -> str:
    """Both files, whole or not at all; the manifest last. Returns the content's hash."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, prepared.rows)
    digest = content_hash(out)
    write_json(manifest_of(out), {"sha256": digest, **about, **prepared.account})
    return digest


def manifest_of(path: Path) -> Path:
    return path.with_name(path.name + MANIFEST)


def summary(account: dict[str, Any]) -> str:
    """The account for people."""
    lengths = account["prompt_tokens"]
    dropped = ", ".join(f"{count} {why}" for why, count in account["dropped"].items())
    overlap = ", ".join(f"{file} {count}" for file, count in account["overlap_by_file"].items())
    others = ", ".join(account["not_compared"])
    return "\n".join(
        [
            f"rows           {account['rows']} of {account['rows_read']} (dropped: {dropped})",
            f"repetitions    {account['repeated_exactly']} exact, "
            f"{account['repeated_normalised']} but for case and blanks",
            f"overlap        {overlap or 'none found'}"
            + (f" (not compared with training sets: {others})" if others else ""),
            "domains        " + ", ".join(f"{k} {v}" for k, v in account["domains"].items()),
            f"prompt tokens  mean {lengths['mean']}, median {lengths['median']}, "
            f"p99 {lengths['p99']}, max {lengths['max']}",
        ]
    )


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    add("--source", required=True, help=f"{' or '.join(PUBLISHED)} (fetched), or a local file")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="model directory")
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--template", choices=TEMPLATES, help="around a question (default: docs/data.md)")
    add("--enable-thinking", action="store_true", help="thinking flag of the chat template")
    add("--max-prompt-tokens", type=int, default=2000, help="longer prompts are dropped; 0: none")
    add("--evaluation-data", type=Path, metavar="DIR", help="drop rows that overlap with these")
    add("--ngram", type=int, default=13, help="words in a row that make an overlap")
    add("--keep-overlap", action="store_true", help="count rows in evaluation data, keep them")
    add("--keep-duplicates", action="store_true", help="count repeated rows, keep them")
    add("--drop-invalid", action="store_true", help="drop faulty rows in place of an error")
    add("--revision", help="of the published set (default: the newest)")
    add("--cache", type=Path, metavar="DIR", help="of downloads (default: that of HF_HOME)")
    return parser


def main() -> None:
    args = _parser().parse_args()
    if args.out.suffix != ".jsonl":
        raise InputError(f"--out {args.out}: a name that ends in .jsonl is needed")
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists already; choose another name or remove it")
    local = Path(os.path.expanduser(args.source))
    check_outside(args.out, "--out", {"--source": local})
    check_place(args.out, f"--out {args.out}")
    if args.ngram < 1 or args.max_prompt_tokens < 0:
        raise InputError("--ngram is 1 or more and --max-prompt-tokens 0 or more; correct it")
    others = evaluation_files(args.evaluation_data) if args.evaluation_data is not None else []
    path = local if local.exists() else fetch(args.source, args.revision, args.cache)
    problems = EvaluationProblems.read(others, args.ngram, path) if others else None
    published = PUBLISHED.get(args.source) if path is not local else None
    template, reason = _template(args.template, published or published_as(path))
    checks = _checks(args, problems)
    rows = dapo_rows(path, "--source") if is_dapo(path) else read_rows(path, "--source")
    prepared = prepare(rows, template, checks)
    about = {
        "source": args.source,
        "repository": published.repository if published else None,
        "revision": args.revision,
        "source_sha256": content_hash(path),
        "template": template,
        "enable_thinking": args.enable_thinking,
        "max_prompt_tokens": args.max_prompt_tokens,
        "ngram": args.ngram if problems else None,
    }
    digest = write(prepared, args.out, about)
    print(f"template       {template}: {reason}")
    print(summary(prepared.account))
    print(f"wrote {args.out}, sha256 {digest}")


def _template(given: str | None, published: Published | None) -> tuple[str, str]:
    """What goes around a question, and why."""
    if given is not None:
        return given, "as --template says"
    if published is not None:
        return published.template, f"that of the published {published.file}"
    return "none", "no published set's name; questions are asked as they are, see --template"


def _checks(args: argparse.Namespace, problems: EvaluationProblems | None) -> Checks:
    from megatron_opdlm.model_files.manifest import huggingface_dir
    from megatron_opdlm.model_files.shape import read_shape
    from megatron_opdlm.model_files.vocabulary import load_tokenizer

    files = huggingface_dir(args.tokenizer)
    tokenizer = load_tokenizer(files)
    if tokenizer is None:
        raise InputError(f"--tokenizer {args.tokenizer}: has no tokenizer; give a model directory")
    return Checks(
        tokenizer=tokenizer,
        vocab_size=read_shape(files).vocab_size,
        enable_thinking=args.enable_thinking,
        max_prompt_tokens=args.max_prompt_tokens or None,
        problems=problems,
        keep_duplicates=args.keep_duplicates,
        keep_overlap=args.keep_overlap,
        drop_invalid=args.drop_invalid,
    )


if __name__ == "__main__":
    command(main)
