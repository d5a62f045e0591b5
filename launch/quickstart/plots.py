"""The quickstart's pictures: training, accuracy on the way, accuracy against speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from evaluation.reporting.figures import STYLE
from launch.quickstart.results import Results

NAMES = {
    "training.png": "loss and KL over trained tokens",
    "accuracy_over_tokens.png": "accuracy over trained tokens",
    "accuracy_over_speed.png": "accuracy against tokens per forward pass",
}
WINDOW = 8  # steps, in the KL picture: single states are noisy
_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d95f02", "#1b8a5a", "#666666"


def draw(results: Results, out: Path) -> None:
    """Write every picture of ``NAMES`` into ``out``."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4))
        _loss(axes[0], results)
        _kl(axes[1], results)
        _save(figure, out / "training.png")
        figure, axis = plt.subplots(figsize=(7, 4.5))
        _accuracy_over_tokens(axis, results)
        _save(figure, out / "accuracy_over_tokens.png")
        figure, axis = plt.subplots(figsize=(7, 4.5))
        _accuracy_over_speed(axis, results)
        _save(figure, out / "accuracy_over_speed.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _thousands(results: Results) -> list[float]:
    return [row["cumulative_trained_tokens"] / 1000 for row in results.metrics]


def _mark_resume(axis: Axes, results: Results) -> None:
    tokens = results.tokens_at(results.record["stopped_after"]) / 1000
    axis.axvline(tokens, color=_GREY, linestyle=":", label="stopped and resumed")


def _loss(axis: Axes, results: Results) -> None:
    axis.plot(_thousands(results), [row["loss"] for row in results.metrics], color=_BLUE)
    _mark_resume(axis, results)
    axis.set(
        xlabel="trained response tokens (thousands)",
        ylabel="loss (nats per masked token)",
        title="Loss: KL(teacher || student)",
        yscale="log",
    )
    axis.legend()


def _kl(axis: Axes, results: Results) -> None:
    """KL by how much of a whole block was masked, and over all masked positions."""
    tokens = _thousands(results)
    size = results.record["block_size"]
    shades = plt.get_cmap("viridis_r")
    for masked in range(1, size + 1):
        label = f"{masked / size:.2f}"  # shares of shorter blocks (beside a prompt) are left out
        values = [row["kl_by_masked_fraction"].get(label) for row in results.metrics]
        points = [(t, v) for t, v in zip(tokens, values, strict=True) if v is not None]
        if points:
            x, y = zip(*points, strict=True)
            color = shades(0.15 + 0.8 * (masked - 1) / max(1, size - 1))
            axis.plot(x, _running_mean(y), color=color, label=f"{masked} of {size}")
    everything = [row["kl"] for row in results.metrics]
    axis.plot(tokens, _running_mean(everything), color="black", linewidth=1, label="all")
    axis.set(
        xlabel="trained response tokens (thousands)",
        ylabel="KL per masked token (nats)",
        title=f"KL by masked tokens of a block (mean of {WINDOW} steps)",
        yscale="log",
    )
    axis.legend(title="masked")


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and up to ``WINDOW - 1`` before it."""
    windows = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _accuracy_over_tokens(axis: Axes, results: Results) -> None:
    points = results.curve()
    axis.plot(
        [tokens / 1000 for tokens, _ in points],
        [100 * accuracy for _, accuracy in points],
        color=_BLUE,
        marker="o",
        label="student, one token per pass",
    )
    _teacher_line(axis, results)
    _mark_resume(axis, results)
    axis.set(
        xlabel="trained response tokens (thousands)",
        ylabel="accuracy on held-out problems (%)",
        title="Accuracy over training",
        ylim=(-3, 104),
    )
    axis.legend(loc="lower right")


def _teacher_line(axis: Axes, results: Results) -> None:
    accuracy = 100 * results.accuracy("teacher")
    axis.axhline(accuracy, color=_GREEN, linestyle="--", label=f"teacher, {accuracy:.1f} %")


def _accuracy_over_speed(axis: Axes, results: Results) -> None:
    groups = (
        ("static", "student, static (tokens per pass)", _BLUE, "o", "{}"),
        ("dynamic", "student, dynamic (threshold)", _ORANGE, "s", "{}"),
    )
    for kind, label, color, marker, text in groups:
        rows = results.named(kind)
        x = [row["tokens_per_forward"] for row in rows.values()]
        y = [100 * row["accuracy"] for row in rows.values()]
        errors = [100 * (row["stderr"] or 0) for row in rows.values()]
        axis.errorbar(x, y, yerr=errors, color=color, marker=marker, label=label, capsize=3)
        for value, px, py in zip(rows, x, y, strict=True):
            axis.annotate(
                text.format(value),
                (px, py),
                xytext=(7, 5),  # beside the bar
                textcoords="offset points",
                fontsize=9,
                color=color,
            )
    teacher = results.evaluations["teacher"]
    point = (teacher["tokens_per_forward"], 100 * teacher["accuracy"])
    axis.plot(*point, "D", color=_GREEN, label="teacher, autoregressive")
    low, high = axis.get_ylim()
    axis.set(
        xlabel="response tokens per forward pass (prefill included)",
        ylabel="accuracy on held-out problems (%)",
        title="Accuracy against speed (bars: standard error)",
        ylim=(low - 0.12 * (high - low), high + 0.12 * (high - low)),
    )
    axis.margins(x=0.1)
    axis.legend(loc="lower left")
