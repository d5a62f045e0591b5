"""Every file under configs/ is a recipe that works on a machine without GPUs as far as it can.

Every published value stands in tests/fixtures/reference/launchers.yaml, from the launchers.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_opdlm import train
from megatron_opdlm.config import Config, flatten, load_config
from megatron_opdlm.curriculum import generation_budget
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.planning.public_shapes import SHAPES, public_name, public_names
from megatron_opdlm.planning.rank_memory import Split, optimizer_bytes_per_number, rank_numbers
from megatron_opdlm.run import dry_run
from tests.forking import ForkServer

CONFIGS = Path(__file__).parents[3] / "configs"
TOYS = ["tiny_cpu", "tiny_cpu_stages"]
RECIPES = sorted(path.stem for path in CONFIGS.glob("[!_]*.yaml") if path.stem not in TOYS)
RANKS = 8

# What the released launchers set, by our keys.
REFERENCE = yaml.safe_load(
    (Path(__file__).parents[2] / "fixtures" / "reference" / "launchers.yaml").read_text()
)
PUBLISHED, VARIANTS = sorted(REFERENCE["launchers"]), REFERENCE["variants"]


def recipe(stem: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{stem}.yaml", list(overrides))


def layout_of(stem: str, machine: str) -> list[str]:
    """What the recipe's own header says for a machine."""
    lines = (CONFIGS / f"{stem}.yaml").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"#   {machine}: ")]
    return shlex.split(line.partition(": ")[2].partition("(")[0])


def h100_overrides(stem: str) -> list[str]:
    return layout_of(stem, "8xH100-80GB")


def held_of(description: str) -> dict[str, float]:
    """GiB that a rank of a dry run holds, by phase."""
    return {
        line.split()[2]: float(line.split()[3])
        for line in description.splitlines()
        if line.startswith(("  in the rollout", "  in the update"))
    }


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither models nor data of this machine are found."""
    monkeypatch.chdir(tmp_path)


def test_every_recipe_is_published_or_says_what_it_differs_in():
    proposals = {stem for stem in RECIPES if stem.startswith("proposal_")}
    assert {*PUBLISHED, *VARIANTS} == {*RECIPES} - proposals


def published(stem: str) -> dict[str, Any]:
    """What a launcher sets, by our keys."""
    own = REFERENCE["launchers"][stem]
    values = {key: value for key, (_, value) in REFERENCE["common"].items()}
    return values | {REFERENCE["keys"][name][0]: value for name, value in own.items()}


@pytest.mark.parametrize("stem", PUBLISHED)
def test_every_value_is_the_published_one(stem):
    """Claim: every key of a recipe has the launcher's value; one without a counterpart has its
    default, but for places and speed."""
    values = flatten(recipe(stem))
    expected = flatten(Config()) | published(stem)
    expected |= {key: values[key] for key in REFERENCE["ours"]}
    expected |= {"model.dtype": "bf16", "teacher.dtype": "bf16"}
    assert values == expected
    size = stem.rpartition("_")[2].upper()
    assert public_name(values["model.path"]) == f"Qwen3-{size}"


@pytest.mark.parametrize("stem", VARIANTS)
def test_a_variant_differs_in_what_it_says_alone(stem):
    own = dict(VARIANTS[stem])
    other = flatten(recipe(own.pop("of"))) | own | {"train.out": f"runs/{stem}/run"}
    assert flatten(recipe(stem)) == other


@pytest.mark.parametrize("stem", PUBLISHED)
def test_the_curriculum_is_the_published_one(stem):
    config = recipe(stem)
    budgets = [generation_budget(s, config.curriculum, config.rollout) for s in (1, 10, 50, 100)]
    assert budgets == REFERENCE["budgets"][config.curriculum.end]


@pytest.mark.parametrize("stem", ["opdlm_0.6b", "opdlm_1.7b"])
def test_small_models_fit_two_cards_of_48_gb(stem):
    """Claim: with what the recipe's header says for them, half of a card is left for activations
    and the cache, and all of a step's responses have a slot."""
    overrides = layout_of(stem, "2x48GB")
    held = held_of(dry_run.describe(recipe(stem, *overrides), 2))
    assert max(held.values()) < 24
    assert recipe(stem, *overrides).rollout.slots * 2 >= 128


@pytest.mark.parametrize("stem", [*RECIPES, *TOYS])
@pytest.mark.parametrize("machine", ["8xH200", "8xH100-80GB"])
def test_every_recipe_dry_runs_without_gpu_weights_or_data(stem, machine):
    """Claim: both layouts divide the model, and what does not depend on the batch fits."""
    overrides = h100_overrides(stem) if machine == "8xH100-80GB" and stem in RECIPES else []
    text = dry_run.describe(recipe(stem, *overrides), RANKS)
    why = "the public shape of Qwen3-" if stem in RECIPES else "launch/quickstart.sh makes it"
    assert f"is not there yet: {why}" in text
    assert f"ranks        {RANKS} = tensor" in text
    held = held_of(text)
    assert set(held) == {"rollout", "update"}
    assert max(held.values()) < (62 if machine == "8xH100-80GB" else 95)


def test_every_layout_of_slots_covers_a_step():
    """Claim: all of a step's responses are decoded at once, none waits for a slot."""
    for stem in RECIPES:
        for overrides in ([], h100_overrides(stem)):
            config = recipe(stem, *overrides)
            replicas = RANKS // (config.model.tensor_parallel * config.model.pipeline_parallel)
            assert config.rollout.slots * replicas >= config.rollout.prompts_per_step, stem


def test_the_dry_run_command(fork_server: ForkServer, tmp_path: Path):
    """Claim: the very command, in a process of its own, prints and leaves nothing."""
    file = CONFIGS / "opdlm_8b.yaml"
    arguments = ["--config", file, "--dry-run", "--world-size", 8]
    done = fork_server.run("megatron_opdlm.train", *arguments)
    assert done.returncode == 0, done.stderr
    assert "8,190,735,360 parameters" in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_is_refused_by_the_dry_run():
    with pytest.raises(InputError, match=r"Qwen3-9B is not a directory.*Qwen3-8B"):
        dry_run.describe(recipe("opdlm_8b", "model.path=checkpoints/Qwen3-9B"), RANKS)


def test_a_published_name_is_no_model_to_train(capsys):
    keys = "model.path=Qwen/Qwen3-8B", "evaluation.every=0"
    arguments = ["--config", str(CONFIGS / "opdlm_8b.yaml"), *keys]
    with pytest.raises(InputError, match=r"model\.path=Qwen/Qwen3-8B is not a directory"):
        train.main(arguments)


def test_missing_data_of_the_evaluation_is_said_before_any_model_is_read():
    """Claim: a recipe without its benchmark's file says how to get it and how to do without."""
    message = r"GSM8K: needs data/evaluation/GSM8K\.json.*evaluation\.download.*evaluation\.every=0"
    with pytest.raises(InputError, match=message):
        train.main(["--config", str(CONFIGS / "opdlm_8b.yaml")])


def test_a_layout_that_does_not_divide_is_refused_without_weights():
    with pytest.raises(InputError, match="tensor_parallel=16 does not divide num_query_groups=8"):
        dry_run.describe(recipe("opdlm_8b", "model.tensor_parallel=16"), 16)


def test_files_hold_no_key_twice_and_nothing_resolves_away():
    """Claim: what stands in a file, or below one of its stages, is what a run gets."""
    for file in CONFIGS.glob("*.yaml"):
        tree = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(tree, dict) and tree, file
        tree.pop("base", None)
        trees: list[tuple[str | None, Any]] = [
            (entry.pop("name", kind), entry)
            for entry in tree.pop("stages", [])
            for kind in [entry.pop("kind")]
        ]
        for stage, own in [(None, tree), *trees]:
            own.pop("evaluate", None)
            keys = flatten(load_config(file, [], stage))
            given = {f"{s}.{k}": v for s, values in own.items() for k, v in values.items()}
            # A word of a choice may be YAML's true or false.
            given = {
                k: str(v).lower() if isinstance(keys[k], str) and isinstance(v, bool) else v
                for k, v in given.items()
            }
            assert {key: keys[key] for key in given} == given, (file, stage)


# Parameters as the model cards give them, in billions.
CARDS = {
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.7,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
    "Qwen2.5-0.5B": 0.5,
    "Qwen2.5-7B": 7.6,
    "Llama-3.2-1B": 1.2,
    "SmolLM2-135M": 0.1,
}


def test_shapes_have_the_published_numbers_of_parameters():
    assert set(public_names()) == set(CARDS)
    for name, billions in CARDS.items():
        assert round(read_shape(SHAPES / name).parameters / 1e9, 1) == billions


@pytest.mark.parametrize("name", sorted(CARDS))
def test_one_rank_holds_every_parameter(name):
    """Claim: undivided, the estimate is the number of parameters; divided, the parts add up."""
    shape = read_shape(SHAPES / name)
    assert rank_numbers(shape, Split()).total == shape.parameters
    split = Split(tensor=2, data=4)
    assert 2 * rank_numbers(shape, split).total == pytest.approx(shape.parameters, rel=1e-3)
    assert 4 * rank_numbers(shape, split).optimizer_share(split) == pytest.approx(
        rank_numbers(shape, split).total
    )


def test_pipeline_stages_hold_their_layers_and_one_end():
    shape = read_shape(SHAPES / "Qwen3-8B")
    embedding = shape.vocab_size * shape.hidden
    layers = shape.parameters - 2 * embedding - shape.hidden
    expected = layers / 4 + embedding + shape.hidden
    assert rank_numbers(shape, Split(pipeline=4)).total == expected


def test_experts_are_divided_over_their_ranks():
    shape = read_shape(SHAPES / "Qwen3-30B-A3B")
    split = Split(data=8, expert=8)
    experts = 48 * 128 * 3 * 2048 * 768
    numbers = rank_numbers(shape, split)
    assert numbers.experts == experts / 8
    assert numbers.dense == shape.parameters - experts
    # every rank holds other experts, so their state is not divided again
    assert numbers.optimizer_share(split) == experts / 8 + numbers.dense / 8


def test_bytes_of_the_optimizer():
    fp32 = dict.fromkeys(("main_params", "exp_avg", "exp_avg_sq"), "fp32")
    assert optimizer_bytes_per_number(2, fp32) == 12
    assert optimizer_bytes_per_number(4, fp32) == 8
    assert optimizer_bytes_per_number(2, fp32 | {"exp_avg": "bf16", "exp_avg_sq": "bf16"}) == 8
