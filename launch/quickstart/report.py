"""Write a quickstart's report.md, report.json and plots from what its stages measured.

python -m launch.quickstart.report DIR
"""

from pathlib import Path
from typing import Any

from evaluation.report import table
from launch.quickstart.results import Results, read_results, report_json
from megatron_opdlm.errors import Arguments, command
from megatron_opdlm.model_files.writing import write_json, write_text

_LABELS = {"teacher": "teacher", "initial": "untrained student"}


def report(out: Path) -> str:
    """Write the report of a finished quickstart; the returned text is for the terminal."""
    from launch.quickstart.plots import draw  # imports matplotlib, which only this needs

    results = read_results(out)
    numbers = report_json(results)
    draw(results, out)
    write_json(out / "report.json", numbers)
    write_text(out / "report.md", markdown(results, numbers))
    bars = [f"  {'yes' if met else 'NO '}  {claim}" for claim, met in checks(numbers)]
    lines = [result_table(results), "", *(bars if results.record["teacher"] == "toy" else [])]
    return "\n".join([*lines, "", f"report: {out / 'report.md'}"])


def result_table(results: Results) -> str:
    """One line an evaluation, without the ones on the way."""
    return table(
        [
            {**row, "task": _LABELS.get(name, "student")}
            for name, row in results.evaluations.items()
            if not name.startswith("curve_")
        ]
    )


def checks(numbers: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the toy run is expected to show, each with whether this run showed it."""
    teacher, student = numbers["teacher_accuracy"], numbers["student_accuracy"]
    dynamic = numbers["dynamic"]["0.9"]
    speed, lost = dynamic["tokens_per_denoising_step"], student - dynamic["accuracy"]
    return [
        (f"at least 500 held-out problems: {numbers['problems']}", numbers["problems"] >= 500),
        (f"teacher at least 95 %: {teacher:.1%}", teacher >= 0.95),
        (
            f"untrained student at most 20 %: {numbers['initial_student_accuracy']:.1%}",
            numbers["initial_student_accuracy"] <= 0.20,
        ),
        (
            f"student at least 95 % of the teacher: {student:.1%} of {teacher:.1%}",
            student >= 0.95 * teacher,
        ),
        (f"at most 3 points lost at threshold 0.9: {100 * lost:.1f}", lost <= 0.03),
        (f"at least 2.5 tokens per denoising step there: {speed:.2f}", speed >= 2.5),
        ("stopped on the way and resumed", numbers["resumed"]),
    ]


def markdown(results: Results, numbers: dict[str, Any]) -> str:
    """The report as a page: table, checks, pictures, seconds, and how it was made."""
    from launch.quickstart.plots import NAMES

    record = results.record
    toy = record["teacher"] == "toy"
    source = "a toy teacher that was trained for this run" if toy else f"`{record['teacher']}`"
    expected = [f"- [{'x' if met else ' '}] {claim}" for claim, met in checks(numbers)]
    pictures = [f"![{caption}]({name})\n" for name, caption in NAMES.items()]
    seconds = [f"| {name} | {value:.0f} |" for name, value in numbers["seconds"].items()]
    return "\n".join(
        [
            "# Quickstart report",
            "",
            f"Teacher: {source}. Task: {record['task']}, {numbers['problems']} held-out problems, "
            f"each once, greedy decoding. Seed {record['seed']}, layout {record['layout']}, blocks "
            f"of {record['block_size']}, {numbers['trained_tokens']:,} trained response tokens, "
            f"logit shift {'on' if numbers['logit_shift'] else 'off'}. Training was killed after "
            f"`{record['stopped_after']}` and resumed.",
            "",
            "```",
            result_table(results),
            "```",
            "",
            "`tok/step`: response tokens per denoising pass. `tok/forward`: response tokens per "
            "model forward, prefill included. `tokens`: mean response length. `s`: wall seconds.",
            "",
            *(["Expected of this run:", "", *expected, ""] if toy else []),
            *pictures,
            "| stage | seconds |",
            "|---|---|",
            *seconds,
            "",
        ]
    )


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    print(report(parser.parse_args().directory))


if __name__ == "__main__":
    command(main)
