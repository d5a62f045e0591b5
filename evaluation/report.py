"""Results as tables and pictures.

    python -m evaluation.report [NAME=]PATH ...              one line a result, on the terminal
    python -m evaluation.report [NAME=]PATH ... --out DIR    the paper's tables and figures
    python -m evaluation.report --paper [[NAME=]PATH ...]    what repeats each of them

A PATH is a summary.json of evaluation.run, evaluation.score or evaluation.sweep, or a directory
that holds some. NAME is the model's name in the tables; the name of a published model (OPDLM-4B)
puts the measured figure beside the published one. With --out: report.md (the tables of accuracies,
accuracy against tokens per step, the areas under these curves) and its pictures. --paper lists
every table and figure of the paper with its recipes and commands, what the results hold of it, and
what differs from the paper.
"""

from pathlib import Path
from typing import Any

from evaluation.reporting.experiments import listing
from evaluation.reporting.results import decoding_label, read_results, read_summary
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_new_directory, write_text

__all__ = ["decoding_label", "read_summary", "table"]

_HEADER = ("task", "decoding", "n", "accuracy", "stderr", "tok/step", "tok/forward", "tokens", "s")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, one line a row under a header."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["task"],
        decoding_label(row["settings"]),
        str(row["n"]),
        _number(row["accuracy"], ".4f"),
        _number(row["stderr"], ".4f"),
        _number(row["tokens_per_denoising_step"], ".2f"),
        _number(row["tokens_per_forward"], ".2f"),
        _number(row["mean_response_tokens"], ".1f"),
        _number(row["seconds"], ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_report(arguments: list[str], out: Path) -> None:
    """``report.md`` and its pictures, in a new directory."""
    from evaluation.reporting.figures import draw
    from evaluation.reporting.paper_tables import not_graded, paper_tables, parallelism_tables

    read = read_results(arguments)
    results = [result for result in read if result.is_graded]
    out.mkdir(parents=True, exist_ok=True)
    pictures = [f"![{file.stem}]({file.name})\n" for file in draw(results, out)]
    parts = ["# Results", "", paper_tables(results), parallelism_tables(results)]
    parts += [*not_graded([result for result in read if not result.is_graded]), *pictures]
    write_text(out / "report.md", "\n".join(parts))


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("results", nargs="*", metavar="[NAME=]PATH")
    parser.add_argument("--paper", action="store_true", help="list what repeats the paper")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new directory for the report")
    args = parser.parse_args()
    if args.out is not None:
        check_new_directory(args.out, "--out")
    if not args.results and not args.paper:
        raise InputError("no results; give a summary.json or a directory, or --paper")
    results = read_results(args.results)
    if args.paper:
        print(listing([result for result in results if result.is_graded]))
    else:
        print(table([result.row for result in results]))
    if args.out is not None:
        write_report(args.results, args.out)
        print(f"report: {args.out / 'report.md'}")


if __name__ == "__main__":
    command(main)
