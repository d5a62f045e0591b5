"""One summary row a task: what was measured, in the contract's keys."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.tasks import Grade


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

    ``accuracy`` is the mean over problems of each problem's share of correct responses, ``stderr``
    its standard error over problems (None for one problem). Token figures are None when the
    predictions do not carry the counts. ``seconds``: wall time of generation and grading in
    ``evaluation.run``, of grading alone in ``evaluation.score``.
    """

    task: str
    n: int  # problems graded
    accuracy: float
    stderr: float | None
    tokens_per_denoising_step: float | None  # response tokens / denoising passes
    tokens_per_forward: float | None  # response tokens / forwards
    mean_response_tokens: float | None
    seconds: float
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    task: str,
    grades: list[list[Grade]],
    counts: Counts | None,
    *,
    seconds: float,
    settings: dict[str, Any],
) -> SummaryRow:
    """Reduce the grades of one task, ``grades[problem][response]``, at least one of each."""
    shares = [sum(grade.correct for grade in row) / len(row) for row in grades]
    n = len(shares)
    mean = sum(shares) / n
    variance = sum((share - mean) ** 2 for share in shares) / (n - 1) if n > 1 else None
    return SummaryRow(
        task=task,
        n=n,
        accuracy=mean,
        stderr=math.sqrt(variance / n) if variance is not None else None,
        tokens_per_denoising_step=_ratio(counts, "response_tokens", "passes"),
        tokens_per_forward=_ratio(counts, "response_tokens", "forwards"),
        mean_response_tokens=_ratio(counts, "response_tokens", "responses"),
        seconds=seconds,
        settings=settings,
    )


def _ratio(counts: Counts | None, above: str, below: str) -> float | None:
    """None without counts or where nothing was counted below the line."""
    values = asdict(counts) if counts else {below: 0}
    return values[above] / values[below] if values[below] else None
