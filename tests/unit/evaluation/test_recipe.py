"""Evaluation recipes say what evaluation.run would be told, run once, and go on after a kill."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from evaluation import recipe
from evaluation.decoding_flags import Loading
from evaluation.recipe import RecipeRun, describe, read_recipe, run_recipe
from evaluation.tasks import get_task
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from tests.conftest import MASK, TinyModels
from tests.unit.evaluation.test_run import AnsweringGenerator

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs" / "evaluation").glob("[!_]*.yaml"))
BENCHMARKS = {
    *("MMLU", "MMLU-Pro", "GPQA-Diamond", "IFEval", "CEval", "LiveBench", "GSM8K", "MATH-500"),
    *("AIME-24", "AIME-25", "LMB-Hard", "ZebraLogic", "HumanEval", "MBPP", "LCB-v6", "Codeforces"),
    *("MMMLU-lite", "INCLUDE-lite", "MT-AIME2024", "MLogiQA"),
}


def write(path: Path, tree: object) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def one(**run: object) -> dict[str, object]:
    return {"runs": [{"name": "a", "tasks": ["addition"], **run}]}


def test_every_training_recipe_has_its_evaluation():
    training = {path.stem for path in (ROOT / "configs").glob("[!_]*.yaml")}
    assert training - {path.stem for path in FILES} == set()


# Which decode block by block, in blocks of how many tokens; the others are autoregressive.
BLOCKS = {
    "opdlm_4b_block8": 8,
    "opdlm_4b_block16": 16,
    "proposal_4b_grown": 16,
    "stage_block8": 8,
}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_recipes_name_benchmarks_and_budgets(file):
    """Claim: general models are asked every benchmark; whatever is asked more than once is drawn;
    only runs that say so think; nothing is longer than the published scripts allow."""
    runs = read_recipe(file)
    tasks = {task for run in runs for task in run.tasks}
    if file.stem.startswith(("opdlm_", "proposal_")) and "math" not in file.stem:
        assert tasks == BENCHMARKS
    assert tasks <= BENCHMARKS | {"exact_match:held_out", "addition"}
    for run in runs:
        size = BLOCKS.get(file.stem, 4)
        assert run.decoding.block_size == run.decoding.denoising_steps == size
        thinks = "thinking" in file.stem or run.name.endswith("think_at_eval")
        assert run.enable_thinking == thinks
        assert run.samples == 1 or (run.decoding.temperature == 1 and run.decoding.top_k == 0)
        assert run.decoding.max_new_tokens <= 16000
    assert describe(runs).count("\n") == len(runs) - 1


def by_name(stem: str) -> dict[str, RecipeRun]:
    runs = read_recipe(ROOT / "configs" / "evaluation" / f"{stem}.yaml")
    return {run.name: run for run in runs}


def test_recipes_decode_as_the_published_scripts_and_the_paper_do():
    """Claim: lengths by the model's size, dynamic decoding at temperature 1 without top-k and 8000
    tokens, the seeds of Table 9, the thresholds of Figures 3 to 5, arg-max by top-k 1 for Qwen3."""
    for stem, tokens in (("opdlm_0.6b", 8000), ("opdlm_1.7b", 8000), ("opdlm_4b", 16000)):
        runs = by_name(stem)
        for name in ("knowledge", "code", "reasoning"):
            decoding = runs[name].decoding
            assert (decoding.max_new_tokens, decoding.temperature) == (tokens, 0)
            assert decoding.remasking == "low_confidence_static"
        dynamic = runs["dynamic-0.9"].decoding
        assert (dynamic.temperature, dynamic.top_k, dynamic.max_new_tokens) == (1, 0, 8000)
        assert (runs["seeds_gpqa"].samples, runs["seeds_aime"].samples) == (8, 32)
    for size in ("", "_block8", "_block16"):
        swept = [run for name, run in by_name(f"opdlm_4b{size}").items() if "sweep" in name]
        assert [run.decoding.threshold for run in swept] == [0.8, 0.85, 0.9, 0.95, 1.0]
        assert {run.tasks for run in swept} == {("MATH-500", "GPQA-Diamond", "MBPP")}
    for run in by_name("qwen3").values():
        d = run.decoding
        assert (d.mode, d.temperature, d.top_k, d.max_new_tokens) == ("ar", 1, 1, 16000)


def test_a_file_extends_its_base(tmp_path):
    """Claim: common settings of the base hold until its own differ, its runs come first, and a run
    of the same name takes the place of the base's."""
    tree = {"common": {"seed": 5, "samples": 2, "temperature": 1.0}}
    write(
        tmp_path / "_base.yaml",
        tree | {"runs": [*one()["runs"], {"name": "b", "tasks": ["addition"]}]},
    )
    own = {"base": "_base.yaml", "common": {"seed": 6}}
    [a, b] = read_recipe(write(tmp_path / "r.yaml", own))
    assert (a.name, a.samples, a.decoding.seed) == ("a", 2, 6) and b.name == "b"
    more = {"runs": [{"name": "a", "tasks": ["addition"], "samples": 3}]}
    [b, a] = read_recipe(write(tmp_path / "r.yaml", own | more))
    assert (a.name, a.samples, a.decoding.seed) == ("a", 3, 6) and b.samples == 2
    with pytest.raises(InputError, match=r"r\.yaml: base: nothing\.yaml is no file"):
        read_recipe(write(tmp_path / "r.yaml", {"base": "nothing.yaml"}))
    with pytest.raises(InputError, match="leads back to itself"):
        read_recipe(write(tmp_path / "r.yaml", {"base": "r.yaml"}))


def test_runs_are_chosen_by_either_name(tmp_path):
    runs = read_recipe(write(tmp_path / "r.yaml", one(thresholds=[0.9, 1])))
    assert recipe._chosen(runs, ["a"]) == runs
    assert recipe._chosen(runs, ["a-1"]) == runs[1:]
    with pytest.raises(InputError, match="--only a-2: no such run"):
        recipe._chosen(runs, ["a-2"])


def test_common_settings_hold_until_a_run_differs(tmp_path):
    tree = {
        "common": {"temperature": 1, "samples": 3, "seed": 5, "enable_thinking": True},
        "runs": [
            {"name": "a", "tasks": ["addition"], "max_new_tokens": 9},
            {"name": "b", "tasks": ["addition"], "temperature": 0.0, "samples": 1},
        ],
    }
    first, second = read_recipe(write(tmp_path / "r.yaml", tree))
    assert first == RecipeRun(
        name="a",
        tasks=("addition",),
        decoding=Decoding(temperature=1.0, seed=5, max_new_tokens=9),
        samples=3,
        enable_thinking=True,
    )
    assert (second.decoding.temperature, second.samples, second.decoding.seed) == (0.0, 1, 5)


def test_thresholds_become_runs_of_dynamic_decoding(tmp_path):
    runs = read_recipe(write(tmp_path / "r.yaml", one(thresholds=[0.9, 1])))
    assert [run.name for run in runs] == ["a-0.9", "a-1"]
    assert [run.decoding.threshold for run in runs] == [0.9, 1.0]
    assert {run.decoding.remasking for run in runs} == {"low_confidence_dynamic"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "must hold sections of keys"),
        ({"run": []}, "needs the keys common and runs"),
        ({"runs": []}, "at least one run"),
        ({"runs": [{"tasks": ["addition"]}]}, "a mapping with a name"),
        ({"runs": [{"name": "a"}]}, "run a: tasks must be a list"),
        (one(temprature=1), "run a: no key 'temprature' \\(did you mean 'temperature'"),
        (one(temperature="hot"), "run a: temperature=hot must be a finite number"),
        (one(samples=0), "run a: samples=0 must be at least 1"),
        (one(samples=True), "samples=true must be an integer"),
        (one(remasking="x"), "run a: remasking=x must be one of low_confidence_static"),
        (one(thresholds=[2]), r"thresholds\[0\]=2.0 must lie in \[0, 1\]"),
        (one(name="a/b"), "the name is a directory's"),
        ({"runs": one()["runs"] * 2}, "two runs are called a"),  # type: ignore[operator]
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, tree, message):
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(write(tmp_path / "r.yaml", tree))
    assert "\n" not in str(caught.value) and "r.yaml" in str(caught.value)


@dataclass
class Opened:
    """Stands for loading a model; counts it, and what was evaluated."""

    loaded: int = 0
    thresholds: list[float] = field(default_factory=list)

    def open(self, *_: object) -> "CountingGenerator":
        self.loaded += 1
        return CountingGenerator(self)


class CountingGenerator(AnsweringGenerator):
    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.opened = opened

    def generate(self, prompts, decoding, *more):
        self.opened.thresholds.append(decoding.threshold)
        return super().generate(prompts, decoding, *more)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    opened = Opened()
    monkeypatch.setattr(recipe, "open_generator", opened.open)
    return opened


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "exact_match.jsonl").write_text('{"question": "1+1=", "answer": "#2"}\n')
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def runs_of(tmp_path: Path) -> list[RecipeRun]:
    tree = {"runs": [{"name": "a", "tasks": ["exact_match"], "thresholds": [0.9, 0.8]}]}
    return read_recipe(write(tmp_path / "r.yaml", tree))


def test_what_is_there_is_not_run_again(tmp_path, data, model, opened):
    """Claim: after a kill only the missing run is run, with the same rows in the end; when nothing
    is missing no model is loaded."""
    where = (model, data, tmp_path / "out", Loading())
    rows = run_recipe(runs_of(tmp_path), *where)
    assert opened.thresholds == [0.9, 0.8] and opened.loaded == 1
    shutil.rmtree(tmp_path / "out" / "a-0.8")
    again = run_recipe(runs_of(tmp_path), *where)
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    assert opened.thresholds[2:] == [0.8] and opened.loaded == 2
    assert run_recipe(runs_of(tmp_path), *where) == again
    assert opened.loaded == 2


def test_results_of_anything_else_are_not_taken(tmp_path, data, model, opened):
    """Claim: other settings, a model that was trained further in its place, and other data are
    refused before anything is run."""
    runs, out = runs_of(tmp_path), tmp_path / "out"
    run_recipe(runs, model, data, out, Loading())
    thinking = [replace(run, enable_thinking=True) for run in runs]
    with pytest.raises(InputError, match="differs in enable_thinking; choose another"):
        run_recipe(thinking, model, data, out, Loading())
    with pytest.raises(InputError, match="differs in model"):
        run_recipe(runs, shutil.copytree(model, tmp_path / "other"), data, out, Loading())
    shutil.rmtree(out / "a-0.9")  # the first run is to be done again, the second one is stale
    (model / "config.json").write_text('{"trained": "further"}')
    with pytest.raises(InputError, match="differs in model_hash"):
        run_recipe(runs, model, data, out, Loading())
    (model / "config.json").write_text("{}")
    (data / "exact_match.jsonl").write_text('{"question": "1+1=", "answer": "#3"}\n')
    with pytest.raises(InputError, match="differs in data_hash"):
        run_recipe(runs, model, data, out, Loading())
    assert opened.loaded == 1


def test_missing_data_is_found_before_the_model_is_loaded(tmp_path, opened):
    with pytest.raises(InputError, match=r"exact_match\.jsonl, which is missing"):
        run_recipe(runs_of(tmp_path), Path("model"), tmp_path, tmp_path / "out", Loading())
    assert opened.loaded == 0


@pytest.mark.slow
def test_the_command_evaluates_a_model(models: TinyModels, data: Path, tmp_path: Path):
    """Claim: the same predictions as evaluation.run makes with the same settings."""
    model = models.hf("student", tied=True)
    runs = {"common": {"max_new_tokens": 8}, "runs": [{"name": "a", "tasks": ["exact_match"]}]}
    file, out = write(tmp_path / "r.yaml", runs), tmp_path / "out"
    common = ["--model", str(model), "--data", str(data), "--mask-token-id", str(MASK)]
    (data / "exact_match.jsonl").write_text('{"prompt": "ab", "answer": "c"}\n')

    def start(*argv: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr

    start("evaluation.recipe", str(file), *common, "--out", str(out))
    start(
        "evaluation.run",
        *common,
        "--tasks",
        "exact_match",
        "--out",
        str(tmp_path / "plain"),
        "--max-new-tokens",
        "8",
    )
    a, b = ((path / "predictions.jsonl").read_text() for path in (out / "a", tmp_path / "plain"))
    assert a == b
    assert json.loads((out / "summary.json").read_text()) == json.loads(
        (out / "a" / "summary.json").read_text()
    )


def test_the_tasks_of_every_recipe_are_registered():
    for file in FILES:
        for run in read_recipe(file):
            for name in run.tasks:
                assert get_task(name).name == name
