"""One summary row a task: what was measured, in the contract's keys and those that a task adds."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from evaluation.tasks import SCORER_ERROR, Grade


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the generation of a task counted, summed over its responses."""

    responses: int
    response_tokens: int  # through the first end token
    passes: int  # denoising passes executed
    forwards: int  # model forwards that a sample took part in, prefill included


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """Figures of one task.

    ``accuracy`` is the mean over problems of each problem's share of correct responses (avg@k),
    ``stderr`` its standard error over problems (None for one problem). Token figures are None when
    the predictions do not carry the counts. ``seconds``: wall time of generation and grading in
    ``evaluation.run``, of grading alone in ``evaluation.score``. A task that could not be graded
    has n = 0, no accuracy and the reason in ``more["skipped"]``.
    """

    task: str
    n: int  # problems graded
    accuracy: float | None
    stderr: float | None
    tokens_per_denoising_step: float | None  # response tokens / denoising passes
    tokens_per_forward: float | None  # response tokens / forwards
    mean_response_tokens: float | None
    seconds: float
    settings: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)  # written beside the keys above

    def as_dict(self) -> dict[str, Any]:
        row = asdict(self)
        more = row.pop("more")
        return {**row, **more}


def summarize(
    task: str,
    grades: list[list[Grade]],
    counts: Counts | None,
    *,
    seconds: float,
    settings: dict[str, Any],
    truncation_rate: float | None = None,
    divisions: list[str | None] | None = None,
    pass_at_k: bool = False,
) -> SummaryRow:
    """Reduce the grades of one task, ``grades[problem][response]``, at least one of each.

    ``divisions``: the language, subject or category of each problem, None where it has none.
    ``truncation_rate``: share of the responses that ran into the limit, None where nobody counted.
    """
    n = len(grades)
    mean, stderr = _mean_and_error([_share(grade.correct for grade in row) for row in grades])
    return SummaryRow(
        task=task,
        n=n,
        accuracy=mean,
        stderr=stderr,
        tokens_per_denoising_step=_ratio(counts, "response_tokens", "passes"),
        tokens_per_forward=_ratio(counts, "response_tokens", "forwards"),
        mean_response_tokens=_ratio(counts, "response_tokens", "responses"),
        seconds=seconds,
        settings=settings,
        more={
            "k": max(len(row) for row in grades),
            **_over_samples(grades),
            "no_answer_rate": _share("no_answer" in grade.flags for row in grades for grade in row),
            "truncation_rate": truncation_rate,
            **_scorer_errors(grades),
            **_other_scores(grades),
            **({"pass_at_k": pass_at(grades)} if pass_at_k else {}),
            **_by_division(grades, divisions or []),
        },
    )


NOTHING_TO_VERIFY = "no row has an answer that can be verified"


def is_waiting(row: dict[str, Any]) -> bool:
    """Whether a summary row is of a task that was skipped for want of its scorer."""
    return row.get("skipped", NOTHING_TO_VERIFY) != NOTHING_TO_VERIFY


def skipped(task: str, reason: str, settings: dict[str, Any]) -> SummaryRow:
    """The row of a task that cannot be graded here: no figures, never a zero."""
    return SummaryRow(
        task=task,
        n=0,
        accuracy=None,
        stderr=None,
        tokens_per_denoising_step=None,
        tokens_per_forward=None,
        mean_response_tokens=None,
        seconds=0.0,
        settings=settings,
        more={"skipped": reason},
    )


def pass_at(grades: list[list[Grade]]) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... and the number of responses that every problem has.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, eq. 1): with c of n responses
    correct, 1 - C(n - c, k) / C(n, k), averaged over the problems.
    """
    most = min(len(row) for row in grades)
    ks = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    return {str(k): _share(_pass_at(row, k) for row in grades) for k in ks}


def _pass_at(row: list[Grade], k: int) -> float:
    n, correct = len(row), sum(grade.correct for grade in row)
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _over_samples(grades: list[list[Grade]]) -> dict[str, float]:
    """``{"std_over_samples"}``: the standard deviation (of the sample) of the accuracies that each
    number of response alone would give, which are those of as many seeds; only where every problem
    has as many responses, and more than one.
    """
    if len({len(row) for row in grades}) != 1 or len(grades[0]) < 2:
        return {}
    runs = [_share(grade.correct for grade in run) for run in zip(*grades, strict=True)]
    return {"std_over_samples": statistics.stdev(runs)}


def _scorer_errors(grades: list[list[Grade]]) -> dict[str, int]:
    """Number of responses that the scorer failed on, which count as wrong; only where there are
    any.
    """
    failed = sum(
        any(flag.startswith(SCORER_ERROR) for flag in grade.flags)
        for row in grades
        for grade in row
    )
    return {"scorer_errors": failed} if failed else {}


def _other_scores(grades: list[list[Grade]]) -> dict[str, float]:
    """Means of the grades' other figures; ``accuracy_strict`` only where it differs anywhere."""
    means = {}
    if any(g.strict is not None and g.strict != g.correct for row in grades for g in row):
        means["accuracy_strict"] = _share(
            _share(g.correct if g.strict is None else g.strict for g in row) for row in grades
        )
    names = {name: None for row in grades for grade in row for name in grade.scores}
    for name in names:
        means[f"accuracy_{name}"] = _mean_score(name, grades)
    return means


def _mean_score(name: str, grades: list[list[Grade]]) -> float:
    """Mean over problems; of a score with weights, over all that its shares are of."""
    given = [[g for g in row if name in g.scores] for row in grades]
    weights = [g.weights.get(name, 0) for row in given for g in row]
    if any(weights):
        kept = sum(g.scores[name] * g.weights.get(name, 0) for row in given for g in row)
        return kept / sum(weights)
    return _share(_share(g.scores[name] for g in row) for row in given if row)


def _by_division(grades: list[list[Grade]], divisions: list[str | None]) -> dict[str, Any]:
    """``{"divisions": {name: {n, accuracy, stderr}}}`` where the problems have more than one."""
    places: dict[str, list[list[Grade]]] = {}
    for row, name in zip(grades, divisions, strict=False):
        if name is not None:
            places.setdefault(name, []).append(row)
    if len(places) < 2:
        return {}
    table = {}
    for name, rows in sorted(places.items()):
        mean, stderr = _mean_and_error([_share(grade.correct for grade in row) for row in rows])
        table[name] = {"n": len(rows), "accuracy": mean, "stderr": stderr, **_other_scores(rows)}
    return {"divisions": table}


def _share(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items)


def _mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error (sample variance over n); no error for one value."""
    n, mean = len(values), _share(values)
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _ratio(counts: Counts | None, above: str, below: str) -> float | None:
    """None without counts or where nothing was counted below the line."""
    values = asdict(counts) if counts else {below: 0}
    return values[above] / values[below] if values[below] else None
