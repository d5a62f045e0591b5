"""Pictures of accuracy against speed: the paper's sweeps and the measured ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from evaluation.reporting.paper_tables import swept
from evaluation.reporting.parallelism import curve
from evaluation.reporting.published import PublishedSweep, sweeps
from evaluation.reporting.results import Result, plain

_PUBLISHED = "#666666"
STYLE: Any = {  # of all plots
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
    "legend.frameon": False,
}


def draw(results: Sequence[Result], out: Path) -> list[Path]:
    """Write accuracy over the threshold, over the block size and over tokens per denoising step
    (one line a model) into ``out``; the files that were made.
    """
    made = []
    with plt.rc_context(STYLE):
        for sweep in sweeps():
            figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
            figure.suptitle(f"{sweep.task}, dynamic decoding")
            _over_setting(left, right, sweep, results)
            made.append(_save(figure, out / f"{sweep.setting}.png"))
        for task in _tasks(results):
            figure, axis = plt.subplots(figsize=(7, 4.8))
            _over_speed(axis, task, results)
            made.append(_save(figure, out / f"accuracy_over_speed_{plain(task)}.png"))
    return made


def _tasks(results: Sequence[Result]) -> list[str]:
    """Tasks with a curve, the paper's own first."""
    measured = [task for _, task in swept(results)]
    return list(dict.fromkeys([*(sweep.task for sweep in sweeps()), *measured]))


def _over_setting(
    left: Axes, right: Axes, sweep: PublishedSweep, results: Sequence[Result]
) -> None:
    """Accuracy (left) and tokens a step (right) over one decoding setting."""
    accuracy = [100 * point.accuracy for point in sweep.points]
    speed = [point.parallelism for point in sweep.points]
    label = f"{sweep.model}, published"
    left.plot(sweep.values, accuracy, "o--", color=_PUBLISHED, label=label)
    right.plot(sweep.values, speed, "o--", color=_PUBLISHED, label=label)
    for model, group in _comparable(sweep, results).items():
        values = [_value(sweep.setting, result) for result in group]
        left.plot(values, [100 * r.accuracy for r in group], "o-", label=model)
        right.plot(values, [r.row["tokens_per_denoising_step"] for r in group], "o-", label=model)
    name = sweep.setting.replace("_", " ")
    for axis, what in ((left, "accuracy, %"), (right, "tokens per denoising step")):
        axis.set_xlabel(name)
        axis.set_ylabel(what)
        axis.set_title(f"{what.partition(',')[0]} over the {name}")
        axis.legend()


def _comparable(sweep: PublishedSweep, results: Sequence[Result]) -> dict[str, list[Result]]:
    """Measured results on the sweep's task, by line's name, in the order of the setting: dynamic
    decoding at several thresholds (a line a model and block size), or at threshold 0.9 with several
    block sizes (a line a model).
    """
    groups: dict[tuple[str, int | None], list[Result]] = {}
    for result in results:
        settings = result.settings
        if plain(result.task) != plain(sweep.task) or settings.get("mode") != "diffusion":
            continue
        if settings["remasking"] != "low_confidence_dynamic":
            continue
        if sweep.setting == "block_size" and settings["threshold"] != 0.9:
            continue
        if result.row["tokens_per_denoising_step"] is not None:
            block = settings["block_size"] if sweep.setting == "threshold" else None
            groups.setdefault((result.line, block), []).append(result)
    lines = {key: group for key, group in groups.items() if len(group) > 1}
    models = [model for model, _ in lines]
    return {
        model if models.count(model) == 1 else f"{model}, blocks of {block}": sorted(
            group, key=lambda r: _value(sweep.setting, r)
        )
        for (model, block), group in lines.items()
    }


def _value(setting: str, result: Result) -> float:
    return float(result.settings[setting])


def _over_speed(axis: Axes, task: str, results: Sequence[Result]) -> None:
    for sweep in sweeps():
        if sweep.task == task:
            points = curve(sweep.points)
            axis.plot(
                [p.parallelism for p in points],
                [100 * p.accuracy for p in points],
                "o--",
                color=_PUBLISHED,
                alpha=1.0 if sweep.setting == "threshold" else 0.5,
                label=f"{sweep.model} over the {sweep.setting.replace('_', ' ')}, published",
            )
    for (model, name), group in swept(results).items():
        points = [p for p in (r.point("tokens_per_denoising_step") for r in group) if p]
        if name == task and points:
            points = curve(points)
            axis.plot(
                [p.parallelism for p in points],
                [100 * p.accuracy for p in points],
                "o-",
                label=model,
            )
    axis.set_xlabel("tokens per denoising step")
    axis.set_ylabel("accuracy, %")
    axis.set_title(f"{task}: accuracy against parallelism")
    axis.legend()


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
