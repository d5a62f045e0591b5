"""The paper's tables in Markdown, with what was measured beside what was published."""

from collections.abc import Sequence

from evaluation.reporting.parallelism import accuracy_under_parallelism, area
from evaluation.reporting.published import PublishedTable, source, sweeps, tables, training_cost
from evaluation.reporting.results import Result, decoding_label, plain

SPEEDS = {
    "tokens_per_denoising_step": "tokens per step",
    "tokens_per_forward": "tokens per forward",
}


# Tables that compare models: here a measured model stands that no table of the paper knows.
_COMPARISONS = ("1", "3", "5", "6")


def paper_tables(results: Sequence[Result]) -> str:
    """Every table of accuracies. In percent; measured ones in bold with their standard error over
    problems (in a table over seeds with their standard deviation over these), and the difference to
    the published figure of the model of the same name.
    """
    parts = [f"Published figures: {source()}.", ""]
    for table in tables():
        parts += [f"## Table {table.number}: {table.title}", "", *_table(table, results), ""]
    others = _others(results)
    if others:
        parts += ["## Other tasks", "", *others, ""]
    return "\n".join(parts)


def _table(table: PublishedTable, results: Sequence[Result]) -> list[str]:
    measured = measured_in(table, results)
    models = list(dict.fromkeys([*table.columns, *(model for model, _ in measured)]))
    lines = _header(["benchmark", *models])
    if table.number in ("1", "6"):
        lines += [_row(["training tokens", *(_cost(model, 0) for model in models)])]
        lines += [_row(["operations (FLOPs)", *(_cost(model, 1) for model in models)])]
    for benchmark in table.rows:
        cells = [_cell(table, benchmark, m, measured.get((m, plain(benchmark)))) for m in models]
        lines.append(_row([benchmark, *cells]))
    unusual = [
        f"{result.model} on {result.task}"
        for (column, _), result in measured.items()
        if column == result.model and not result.is_one_token_a_step
    ]
    if unusual:
        lines += ["", f"Decoded faster than one token a step: {', '.join(sorted(set(unusual)))}."]
    return [*lines, *(["", table.note] if table.note else [])]


def measured_in(table: PublishedTable, results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """One result for each (column, plain name of the benchmark): of several the one that is decoded
    as the paper's tables are, then the one over most problems, then that of most responses.
    """
    benchmarks = {plain(benchmark) for benchmark in table.rows}
    chosen: dict[tuple[str, str], Result] = {}
    for result in results:
        column = _column(table, result)
        if column is None or plain(result.task) not in benchmarks:
            continue
        key = column, plain(result.task)
        known = chosen.get(key)
        if known is None or _rank(result) > _rank(known):
            chosen[key] = result
    return chosen


def _column(table: PublishedTable, result: Result) -> str | None:
    """The column of a result, by its decoding where the table has such a column; None: the result
    belongs to other tables.
    """
    decoded = f"{result.model} {decoding_label(result.settings)}"
    if decoded in table.columns:
        return decoded
    if result.model in table.columns:
        return result.model
    elsewhere = any(result.model in other.columns for other in tables())
    return result.model if table.number in _COMPARISONS and not elsewhere else None


def _rank(result: Result) -> tuple[bool, int, int]:
    return result.is_one_token_a_step, result.row["n"], result.row.get("k", 1)


def _others(results: Sequence[Result]) -> list[str]:
    """Measured tasks that no table of the paper has."""
    known = {plain(benchmark) for table in tables() for benchmark in table.rows}
    others = [result for result in results if plain(result.task) not in known]
    if not others:
        return []
    lines = _header(["model", "task", "n", "accuracy"])
    return lines + [
        _row([r.model, r.task, str(r.row["n"]), _percent(r.accuracy, r.row.get("stderr"))])
        for r in others
    ]


def not_graded(results: Sequence[Result]) -> list[str]:
    """The tasks that have no figure, and why."""
    if not results:
        return []
    lines = _header(["model", "task", "reason"])
    lines += [_row([r.model, r.task, str(r.row.get("skipped", ""))]) for r in results]
    return ["## Not graded", "", *lines, ""]


def _cost(model: str, which: int) -> str:
    cost = training_cost(model)
    return "" if cost is None else f"{cost[which]:.2g}"


def _cell(table: PublishedTable, benchmark: str, column: str, result: Result | None) -> str:
    published = table.rows[benchmark].get(column)
    deviation = table.deviations.get(benchmark, {}).get(column)
    theirs = "" if published is None else f"{published:.1f}"
    if deviation is not None:
        theirs += f" ± {deviation:.1f}"
    if result is None:
        return theirs
    over = "std_over_samples" if table.deviations else "stderr"
    ours = f"**{_percent(result.accuracy, result.row.get(over))}**"
    if published is None:
        return ours
    return f"{theirs} / {ours} ({100 * result.accuracy - published:+.1f})"


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def parallelism_tables(results: Sequence[Result]) -> str:
    """Accuracy over speed for each model and task that was decoded in more than one way, with the
    areas under the curves; the paper's own sweeps first.
    """
    parts = []
    for sweep in sweeps():
        name = sweep.setting.replace("_", " ")
        parts += [f"## {sweep.task} over the {name}: {sweep.model}, published", ""]
        parts += _header([name, "accuracy", "tokens per step"])
        for value, point in zip(sweep.values, sweep.points, strict=True):
            cells = [f"{value:g}", f"{100 * point.accuracy:.1f}", f"{point.parallelism:.2f}"]
            parts.append(_row(cells))
        parts.append("")
    for (model, task), group in swept(results).items():
        parts += [f"## {task} over the decoding: {model}, measured", "", *_points(group), ""]
    curves = _areas(results)
    if curves:
        parts += ["## Areas under the curves", "", *curves, ""]
    return "\n".join(parts)


def swept(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by (curve's name, task), of those that were decoded in more than one way."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.line, result.task), []).append(result)
    return {key: group for key, group in groups.items() if len(group) > 1}


def _points(group: Sequence[Result]) -> list[str]:
    lines = _header(["decoding", "block", "accuracy", *SPEEDS.values()])
    for result in sorted(group, key=lambda r: r.row["tokens_per_denoising_step"] or 0.0):
        speeds = [result.row[measure] for measure in SPEEDS]
        lines.append(
            _row(
                [
                    decoding_label(result.settings),
                    str(result.settings.get("block_size", "")),
                    _percent(result.accuracy, result.row.get("stderr")),
                    *("-" if speed is None else f"{speed:.2f}" for speed in speeds),
                ]
            )
        )
    return lines


def _areas(results: Sequence[Result]) -> list[str]:
    """Areas by both measures of speed; AUP compares with the best accuracy on the task here."""
    lines = _header(["task", "model", "speed", "area", "AUP"])
    groups = swept(results)
    for (model, task), group in groups.items():
        best = max(r.accuracy for (_, other), g in groups.items() if other == task for r in g)
        for measure, name in SPEEDS.items():
            points = [p for p in (result.point(measure) for result in group) if p is not None]
            if points:
                aup = accuracy_under_parallelism(points, best)
                lines.append(_row([task, model, name, f"{area(points):.3f}", f"{aup:.3f}"]))
    return lines if groups else []


def _header(names: Sequence[str]) -> list[str]:
    return [_row(names), _row(["---"] * len(names))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
