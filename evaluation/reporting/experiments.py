"""The list of the paper's tables and figures: what repeats each, what has been measured, and what
differs (``published/experiments.yaml``).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation.reporting.paper_tables import measured_in
from evaluation.reporting.published import PublishedTable, tables
from evaluation.reporting.results import THINKING, Result, decoding_label, plain

_RANKS = 8
_DATA, _BENCHMARKS = "data", "data/evaluation"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the paper and how it comes about here."""

    name: str  # in the tables
    start: str  # published model that training starts from, or that is asked as it is
    recipe: str | None = None  # of training, and of the evaluation unless that is named
    evaluation: str | None = None
    data: str | None = None  # training set
    teacher: str | None = None  # None: the model that it starts from
    answers: bool = False  # trained on the autoregressive model's own answers

    @property
    def out(self) -> str:
        return f"runs/{self.recipe or self.name.lower()}"

    @property
    def evaluation_recipe(self) -> str:
        return f"configs/evaluation/{self.evaluation or self.recipe}.yaml"

    def makes(self) -> list[str]:
        """The commands that make the model and ask it everything, in their order."""
        if self.recipe is None:
            return []
        prompts = f"{_DATA}/{self.data}.jsonl"
        start = f"models/{self.start}"
        prepare = ["opdlm prepare --source", str(self.data), "--tokenizer", start]
        commands = [[*prepare, "--evaluation-data", _BENCHMARKS, "--out", prompts]]
        if self.teacher:
            paths = ["--hf", f"models/{self.teacher}", "--out", f"checkpoints/{self.teacher}"]
            commands.append(["opdlm import", *paths])
        if self.answers:
            out = f"{_DATA}/{self.data}_answers_{self.start.lower()}.jsonl"
            asked = ["--model", start, "--prompts", prompts, "--out", out]
            how = ["--temperature 1 --max-new-tokens 4000"]
            commands.append([_ranks("evaluation.answer"), *asked, *how])
        pipeline = ["opdlm pipeline", f"configs/{self.recipe}.yaml", "--hf", start]
        commands.append([*pipeline, "--data", _BENCHMARKS, "--out", self.out])
        return [" ".join(command) for command in commands]

    def asks(self, runs: Sequence[str]) -> str:
        """The command that evaluates these runs only."""
        model = f"{self.out}/exported" if self.recipe else f"models/{self.start}"
        paths = ["--model", model, "--data", _BENCHMARKS, "--out", f"{self.out}/evaluation"]
        asked = [_ranks("evaluation.recipe"), self.evaluation_recipe, *paths, "--only", *runs]
        return " ".join(asked)


def _ranks(module: str) -> str:
    return f"torchrun --nproc-per-node {_RANKS} -m {module}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper."""

    name: str  # "Table 1"
    title: str
    models: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> runs
    tasks: Sequence[str] = ()  # benchmarks of one that is no table of accuracies
    differs: str

    @property
    def is_sweep(self) -> bool:
        """Whether it is over thresholds."""
        return any("sweep" in runs for runs in self.models.values())

    @property
    def table(self) -> PublishedTable | None:
        """Its published figures, where it is a table of accuracies."""
        number = self.name.removeprefix("Table ")
        return next((table for table in tables() if table.number == number), None)


@functools.cache
def _data() -> dict[str, Any]:
    path = Path(__file__).parent / "published" / "experiments.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def models() -> dict[str, Model]:
    """Every model of the list, by name."""
    return {name: Model(name=name, **values) for name, values in _data()["models"].items()}


def experiments() -> list[Experiment]:
    """Every table and figure, in the paper's order."""
    titles = {f"Table {table.number}": table.title for table in tables()}
    return [
        Experiment(name=name, **{"title": titles.get(name, ""), **values})
        for name, values in _data()["experiments"].items()
    ]


def listing(results: Sequence[Result]) -> str:
    """The whole list as text."""
    known = models()
    parts = ["MODELS: what makes each and asks it all runs of its evaluation recipe", ""]
    for model in known.values():
        how = [f"    {command}" for command in model.makes()]
        parts += [model.name, *(how or ["    as it is published"]), ""]
    parts += ["TABLES AND FIGURES", ""]
    for experiment in experiments():
        parts.append(f"{experiment.name}: {experiment.title}")
        for name, runs in experiment.models.items():
            recipe = known[name].recipe
            trained = f"configs/{recipe}.yaml" if recipe else "no training"
            parts.append(f"    {name} ({trained})")
            parts += [f"        {known[name].asks(runs)}"] if runs else []
        parts.append(f"    measured: {_measured(experiment, results)}")
        parts += [f"    differs: {experiment.differs}", ""]
    return "\n".join(parts)


def _measured(experiment: Experiment, results: Sequence[Result]) -> str:
    """What the results hold of an experiment."""
    if experiment.table is not None:
        return _measured_cells(experiment.table, results)
    if not any(experiment.models.values()):
        return "not an evaluation"
    names = {*experiment.models, *(name + THINKING for name in experiment.models)}
    tasks = set(map(plain, experiment.tasks))
    own = [r for r in results if r.model in names and plain(r.task) in tasks]
    if experiment.is_sweep:
        own = [result for result in own if not result.is_one_token_a_step]
    figures = [
        f"{r.model} {r.task} {100 * r.accuracy:.1f} ({decoding_label(r.settings)})" for r in own
    ]
    return ", ".join(dict.fromkeys(figures)) or "nothing yet"


def _measured_cells(table: PublishedTable, results: Sequence[Result]) -> str:
    """Column by column: how many of its benchmarks, and the figures beside the published ones."""
    measured = measured_in(table, results)
    told = []
    for column in filter(_ours, table.columns):
        cells = []
        asked = [task for task, row in table.rows.items() if row[column] is not None]
        for task in asked:
            result = measured.get((column, plain(task)))
            if result is not None:
                cells.append(f"{task} {100 * result.accuracy:.1f} ({table.rows[task][column]:.1f})")
        told.append(f"{column} {len(cells)} of {len(asked)}" + _listed(cells))
    return "; ".join(told)


def _listed(cells: Sequence[str]) -> str:
    return f": {', '.join(cells)}" if cells else ""


def _ours(column: str) -> bool:
    """Whether a column of the paper is of a model of the list, however it is decoded."""
    return any(column == name or column.startswith(name + " ") for name in models())
