"""The list of the paper's tables and figures: whole, and every line of it a command that works."""

import shlex
from pathlib import Path

import pytest

from checkpoint_tools import import_hf
from evaluation import answer, recipe, report
from evaluation.reporting.experiments import experiments, listing, models
from evaluation.reporting.published import sweeps
from evaluation.reporting.results import Result
from launch import pipeline as run_pipeline
from launch.opdlm import COMMANDS
from megatron_opdlm import prepare_data
from megatron_opdlm.config import load_config
from megatron_opdlm.data.sources import PUBLISHED
from megatron_opdlm.planning.public_shapes import public_name

ROOT = Path(__file__).parents[4]
MODELS = models()
RANKS = 8


def test_every_table_and_figure_is_listed():
    """Claim: Tables 1 to 14 and Figures 1 to 6, each once and in their order; every column that
    could be made here is made by a model of the list."""
    listed = [
        (kind.rstrip("s"), number)
        for kind, _, numbers in (experiment.name.partition(" ") for experiment in experiments())
        for number in range(int(numbers.split("-")[0]), int(numbers.split("-")[-1]) + 1)
    ]
    assert listed == [("Table", n) for n in range(1, 15)] + [("Figure", n) for n in range(1, 7)]
    assert all(experiment.title and experiment.differs for experiment in experiments())
    for experiment in experiments():
        assert set(experiment.models) <= set(MODELS), experiment.name
        if experiment.table is not None:
            ours = ("OPDLM", "SFT", "Qwen3")
            for column in experiment.table.columns:
                plain = column.removesuffix(" think@eval").removesuffix(" dynamic 0.9")
                assert plain in experiment.models or not column.startswith(ours), column
    assert {sweep.model for sweep in sweeps()} <= set(MODELS)
    assert {name for e in experiments() for name in e.models} == set(MODELS)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.recipe])
def test_a_models_recipe_dry_runs(name, tmp_path, monkeypatch, capsys):
    """Claim: the recipe exists, starts from the model and reads the data that the list says, asks
    the teacher that it says, and its layout fits eight GPUs; the commands that make the model are
    taken as they stand, the pipeline's with --dry-run."""
    model = MODELS[name]
    config = load_config(ROOT / "configs" / f"{model.recipe}.yaml", [])
    monkeypatch.chdir(tmp_path)
    assert public_name(config.model.path) == model.start
    assert (public_name(config.teacher.path) if config.teacher.path else None) == model.teacher
    assert config.data.path == f"data/{model.data}.jsonl" and model.data in PUBLISHED
    prepare, *between, pipeline = model.makes()
    assert "opdlm prepare" in prepare and f"configs/{model.recipe}.yaml" in pipeline
    made = [words[words.index("--out") + 1] for words in map(shlex.split, between)]
    assert made == [path for path in (config.teacher.path, config.mixing.path) if path]
    assert config.mixing.fraction == float(model.answers)
    parsers = {"opdlm import": import_hf._parser(), "evaluation.answer": answer._parser()}
    for line in between:
        (start, parser) = next(found for found in parsers.items() if found[0] in line)
        parser.parse_args(shlex.split(line.partition(start)[2]))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr("sys.argv", [*shlex.split(pipeline)[1:], "--dry-run"])
    run_pipeline.main()
    assert f"ranks        {RANKS} = tensor" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def test_every_command_of_the_list_is_one(monkeypatch, capsys):
    """Claim: the commands name modules and flags that exist; each evaluation passes --dry-run with
    its runs, which ask the benchmarks of its table."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["report", "--paper"])
    report.main()
    commands = ("opdlm ", "torchrun ")
    text = [line.strip() for line in capsys.readouterr().out.splitlines()]
    lines = [shlex.split(line) for line in text if line.startswith(commands)]
    evaluations = [line for line in lines if "evaluation.recipe" in line]
    assert len(evaluations) >= 30
    for line in {tuple(line) for line in evaluations}:
        arguments = list(line)[line.index("evaluation.recipe") + 1 :]
        monkeypatch.setattr("sys.argv", ["recipe", *arguments, "--dry-run"])
        recipe.main()
    capsys.readouterr()
    for line in lines:
        if line[:1] == ["opdlm"]:
            assert line[1] in COMMANDS
    prepared = [line[2:] for line in lines if line[:2] == ["opdlm", "prepare"]]
    assert prepared and all(prepare_data._parser().parse_args(line) for line in prepared)


@pytest.mark.parametrize("experiment", experiments(), ids=lambda experiment: experiment.name)
def test_the_runs_ask_what_the_table_shows(experiment):
    """Claim: for every figure of ours in a table there is a run that measures it."""
    for name, chosen in experiment.models.items():
        file = ROOT / MODELS[name].evaluation_recipe
        runs = recipe._chosen(recipe.read_recipe(file), list(chosen)) if chosen else []
        asked = {task for run in runs for task in run.tasks}
        shown = set(experiment.tasks)
        if experiment.table is not None:
            rows = experiment.table.rows
            shown = {task for task, row in rows.items() if row.get(name) is not None}
        assert shown <= asked or not chosen, (experiment.name, name, shown - asked)


def test_what_was_measured_is_told_beside_what_was_published():
    row = {"task": "MATH-500", "n": 500, "accuracy": 0.7, "stderr": None}
    how = {"mode": "diffusion", "remasking": "low_confidence_static"}
    static = row | {"settings": how | {"block_size": 4, "denoising_steps": 4}}
    fast = {"remasking": "low_confidence_dynamic", "threshold": 0.9}
    dynamic = row | {"accuracy": 0.6, "settings": static["settings"] | fast}
    text = listing([Result(model="OPDLM-4B", row=found) for found in (static, dynamic)])
    parts = {part.partition(":")[0]: part for part in text.split("\n\n")}
    assert "OPDLM-4B 1 of 16: MATH-500 70.0 (72.8);" in parts["Table 1"]
    assert "OPDLM-4B dynamic 0.9 1 of 6: MATH-500 60.0 (71.6)" in parts["Table 11"]
    assert "measured: OPDLM-4B MATH-500 60.0 (dynamic 0.9)" in parts["Figure 3"]
    assert "measured: nothing yet" in parts["Figure 1"]
