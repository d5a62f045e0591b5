"""Print summary rows as a table: ``python -m evaluation.report SUMMARY.json ...``."""

import json
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import Arguments, InputError, command

_HEADER = ("task", "decoding", "n", "accuracy", "stderr", "tok/step", "tok/forward", "tokens", "s")


def decoding_label(settings: dict[str, Any]) -> str:
    """A short name of the decoding: ``ar``, ``static T=4``, ``dynamic 0.9``; empty if unknown."""
    if not settings.get("mode"):
        return ""
    if settings["mode"] == "ar":
        return "ar"
    name = settings["remasking"].removeprefix("low_confidence_")
    if name == "dynamic":
        return f"dynamic {settings['threshold']:g}"
    if name == "entropy_bounded":
        return f"entropy {settings['entropy_bound']:g}"
    return f"{name} T={settings['denoising_steps']}"


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


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of a summary.json that ``evaluation.run`` or ``evaluation.score`` wrote."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a summary.json written by evaluation.run")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(rows, list) and all("accuracy" in row for row in rows)
    except (json.JSONDecodeError, AssertionError, TypeError) as error:
        raise InputError(f"{path}: not a list of summary rows; give a summary.json") from error
    return rows


def main() -> None:
    parser = Arguments(prog="python -m evaluation.report", description=__doc__)
    parser.add_argument("summaries", nargs="+", type=Path, metavar="SUMMARY.json")
    args = parser.parse_args()
    print(table([row for path in args.summaries for row in read_summary(path)]))


if __name__ == "__main__":
    command(main)
