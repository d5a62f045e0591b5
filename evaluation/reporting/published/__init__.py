"""The paper's published figures, shipped as data with their source (``paper.json``)."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.reporting.parallelism import Point


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One table of accuracies in percent; None where the paper has a dash."""

    number: str
    title: str
    columns: list[str]  # models
    rows: dict[str, dict[str, float | None]]  # benchmark -> model -> accuracy
    # benchmark -> model -> standard deviation over seeds, where the paper has it
    deviations: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""  # where it disagrees with another table


@dataclass(frozen=True, kw_only=True)
class PublishedSweep:
    """Accuracy and speed of one model over a decoding setting."""

    setting: str  # "threshold" | "block_size"
    model: str
    task: str
    values: list[float]
    points: list[Point]


@functools.cache
def _data() -> dict:
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def source() -> str:
    """Where the figures come from."""
    return _data()["source"]


def tables() -> list[PublishedTable]:
    """The paper's tables of accuracies, in its order; that of its ablation (4) is not here."""
    return [PublishedTable(number=number, **table) for number, table in _data()["tables"].items()]


def training_cost(model: str) -> tuple[float, float] | None:
    """Published (training tokens, operations) of a model; None where there are none."""
    cost = _data()["training"].get(model)
    return None if cost is None else (cost[0], cost[1])


def sweeps() -> list[PublishedSweep]:
    """The decoding sweeps of the paper's figures."""
    return [
        PublishedSweep(
            setting=setting,
            model=sweep["model"],
            task=sweep["task"],
            values=[value for value, _, _ in sweep["points"]],
            points=[
                Point(accuracy=accuracy / 100, parallelism=speed)
                for _, accuracy, speed in sweep["points"]
            ],
        )
        for setting, sweep in _data()["sweeps"].items()
    ]
