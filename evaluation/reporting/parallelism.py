"""Accuracy against parallelism: the curve of a sweep and the areas under it.

Parallelism is tokens per denoising step (as the paper plots it) or tokens per forward (as AUP is
defined: Qian et al., "d3LLM", arXiv 2601.07568).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PENALTY = 3.0  # alpha of AUP
LARGEST_LOSS = 0.05  # AUP leaves out points whose accuracy is lower than the slowest's by more


@dataclass(frozen=True, kw_only=True)
class Point:
    """One decoding setting."""

    accuracy: float  # from 0 to 1
    parallelism: float  # tokens per step or per forward


def curve(points: Sequence[Point]) -> list[Point]:
    """Points by rising parallelism; of several with the same, the most accurate."""
    best: dict[float, Point] = {}
    for point in points:
        known = best.get(point.parallelism)
        if known is None or point.accuracy > known.accuracy:
            best[point.parallelism] = point
    return [best[speed] for speed in sorted(best)]


def area(points: Sequence[Point]) -> float:
    """Area under the curve from parallelism 0, by trapezoids; the first point's accuracy holds to
    its left. A model that decodes one token a step and no more has its accuracy as its area.

        area = rho_1 y_1 + sum_i (rho_i - rho_(i-1)) (y_i + y_(i-1)) / 2

    Raises ValueError without points.
    """
    return _weighted_area(curve(points), lambda accuracy: accuracy)


def accuracy_under_parallelism(points: Sequence[Point], best_accuracy: float) -> float:
    """AUP of arXiv 2601.07568: the area with accuracies y weighted by
    min(1, exp(-3 (1 - y / y_max))), over points that lose at most 5 percentage points against the
    slowest. In accuracy x tokens, so 100 times smaller than with accuracies in percent.

    ``best_accuracy``: y_max, the highest that any compared method reaches on the task.
    """
    kept = curve(points)
    kept = [p for p in kept if p.accuracy >= kept[0].accuracy - LARGEST_LOSS]

    def weighted(accuracy: float) -> float:
        if best_accuracy <= 0:
            return 0.0
        return accuracy * min(1.0, math.exp(-PENALTY * (1 - accuracy / best_accuracy)))

    return _weighted_area(kept, weighted)


def _weighted_area(points: Sequence[Point], weighted: Callable[[float], float]) -> float:
    if not points:
        raise ValueError("an area needs at least one point")
    first = points[0]
    total = first.parallelism * first.accuracy
    for left, right in itertools.pairwise(points):
        height = (weighted(left.accuracy) + weighted(right.accuracy)) / 2
        total += (right.parallelism - left.parallelism) * height
    return total
