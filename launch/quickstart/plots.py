"""The quickstart's pictures: training, accuracy on the way, accuracy against speed."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from launch.quickstart.results import Results

NAMES = {
    "training.png": "loss and KL over trained tokens",
    "accuracy_over_tokens.png": "accuracy over trained tokens",
    "accuracy_over_speed.png": "accuracy against tokens per forward pass",
}
_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d95f02", "#1b8a5a", "#666666"
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
    "legend.frameon": False,
}


def draw(results: Results, out: Path) -> None:
    """Write every picture of ``NAMES`` into ``out``."""
    with plt.rc_context(_STYLE):
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
        ylabel="loss: KL(teacher || student), nats per masked token",
        title="Loss",
        yscale="log",
    )
    axis.legend()


def _kl(axis: Axes, results: Results) -> None:
    """KL by how much of the block was masked: states with more masks are harder."""
    tokens = _thousands(results)
    shares = [row["kl_by_masked_fraction"] for row in results.metrics]
    labels = sorted(set().union(*shares), key=float)
    shades = plt.get_cmap("viridis_r")
    for number, label in enumerate(labels):
        points = [(t, s[label]) for t, s in zip(tokens, shares, strict=True) if label in s]
        color = shades(0.15 + 0.8 * number / max(1, len(labels) - 1))
        axis.plot(*zip(*points, strict=True), color=color, label=label)
    axis.set(
        xlabel="trained response tokens (thousands)",
        ylabel="KL(teacher || student), nats per masked token",
        title="KL by masked share of the block",
        yscale="log",
    )
    axis.legend(title="masked share")


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
