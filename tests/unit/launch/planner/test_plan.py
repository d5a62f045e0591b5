"""``opdlm plan``: what fits, how long it takes, agreement with the dry run and with runs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.planner import run
from launch.planner.estimate import Question, seconds_of_step
from launch.planner.layouts import (
    OFFLOADS,
    WHOLE,
    Planned,
    Refused,
    as_it_is,
    search,
    why_not,
    with_keys,
)
from launch.planner.measured import corrections
from launch.planner.sequence_work import Lengths
from megatron_opdlm.config import load_config, to_yaml
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware.planned import planned_gpu
from megatron_opdlm.planning.accelerators import ACCELERATORS, ASSUMED
from megatron_opdlm.planning.step_time import Machine
from megatron_opdlm.run import dry_run
from megatron_opdlm.run.dry_run import open_or_public

CONFIGS = Path(__file__).parents[4] / "configs"
GIB = 2**30


def question(recipe: str, *keys: str, gpus: int = 8, gpu: str = "h200", **assumed: Any) -> Question:
    config = load_config(CONFIGS / f"{recipe}.yaml", list(keys))
    student, teacher, _ = open_or_public(with_keys(config, WHOLE), 1)
    return Question(
        config=config,
        student=student,
        teacher=teacher,
        gpus=gpus,
        machine=Machine(gpu=ACCELERATORS[gpu], efficiency=ASSUMED, per_node=8),
        hardware=planned_gpu(),
        **{"prompt": 200, "response": 1068, "per_pass": 1.91, "steps": 480} | assumed,
    )


def own(asked: Question) -> Planned:
    """The recipe's own layout, which divides the GPUs."""
    planned = as_it_is(asked)
    assert isinstance(planned, Planned)
    return planned


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither models nor data of this machine are found."""
    monkeypatch.chdir(tmp_path)


SMALL = ("opdlm_0.6b", "opdlm_1.7b", "opdlm_0.6b_from_4b")  # all recipes below 4B


def test_models_below_4b_fit_two_cards_of_48_gb():
    """Claim: the paper's machine for them; as the recipe's head says for it, and as proposed."""
    for recipe in SMALL:
        keys = ["rollout.slots=64", "update.tokens_per_microbatch=8192"]
        asked = question(recipe, *keys, gpus=2, gpu="a6000")
        assert why_not(asked, own(asked)) is None, recipe
        fitting, _ = search(asked)
        assert fitting, recipe
        for planned in fitting:
            peaks = [planned.memory.peak(phase) for phase in ("rollout", "teacher", "update")]
            assert max(peaks) < 48e9
            split = planned.split
            assert split.tensor * split.pipeline * split.context * split.data == 2


def test_what_does_not_fit_is_refused_with_a_reason():
    """Claim: a 32B model is on no two cards of 48 GB; every layout says why in one line, filled in
    the way that takes least: all offloaded, recomputed, in short rows."""
    asked = question("proposal_32b", gpus=2, gpu="a6000")
    mine = as_it_is(asked)
    assert isinstance(mine, Refused) and "2 ranks cannot be split into tensor_pa" in mine.reason
    fitting, refused = search(asked)
    assert not fitting and len(refused) == 4
    assert all("\n" not in one.reason and "GiB" in one.reason for one in refused)
    keys = {**WHOLE, **OFFLOADS[-1], "model.tensor_parallel": 2, "model.sequence_parallel": True}
    keys |= {"model.recompute": "true", "update.tokens_per_microbatch": 4096}
    smallest = own(dataclasses.replace(asked, config=with_keys(asked.config, keys)))
    assert refused[-1].reason == why_not(asked, smallest)


def test_the_plan_says_what_the_dry_run_says():
    """Claim: every part that a rank holds is the same, for dense models, experts, two models and
    weights that wait elsewhere."""
    for recipe, *keys in (
        ("opdlm_8b",),
        ("proposal_30b_a3b", "teacher.offload_weights=true"),
        ("opdlm_math_8b_from_32b", "lora.rank=16"),
    ):
        asked = question(recipe, *keys)
        lines = dry_run.describe(asked.config, 8).splitlines()
        for part, size in own(asked).memory.parts.items():
            assert any(
                line.startswith(f"  {part}") and line.endswith(f"{size / GIB:.3f}")
                for line in lines
            ), f"{recipe} {part}"


def test_a_kept_cache_is_there_in_every_phase():
    """Claim: a budget of the cache is kept between rollouts, so an update has less room; without
    one it is given back."""
    token = 2 * 36 * 8 * 128 * 2  # keys and values of a position: layers, groups, head, bytes
    kept = own(question("opdlm_8b", "rollout.kv_cache_tokens=50000")).memory
    assert kept.sizes("update")["KV cache"] == 50000 * token
    given_back = own(question("opdlm_8b")).memory
    assert "KV cache" not in given_back.sizes("update")
    assert given_back.sizes("rollout")["KV cache"] == 16 * 6000 * token


def test_operations_are_those_of_a_count_by_hand():
    """Claim: within a tenth of 2 N a token and forward: the prompt and two copies of a response,
    forward, backward and once more; the teacher over prompt and response; the rollout's passes."""
    asked = question("opdlm_8b", response=1000)
    work = asked.counter.count(
        Lengths(prompt=200, response=1000, longest=4000, per_pass=2.0), recompute="true"
    )
    n = asked.student.shape.parameters
    assert work.update_flops == pytest.approx(8 * n * 2200, rel=0.15)
    assert work.teacher_flops == pytest.approx(2 * n * 1200, rel=0.15)
    assert work.rollout_flops == pytest.approx(2 * n * (200 + 1000 * 3), rel=0.15)
    assert work.trained_tokens == 1000


def test_seconds_follow_from_the_datasheet():
    """Claim: one rank's rollout reads its weights once a pass, an update computes at the assumed
    share, and faster rates, more ranks or shorter responses make a step shorter."""
    asked = question("opdlm_8b", "rollout.prompts_per_step=1", "optimizer.batch_size=1", gpus=1)
    planned = own(asked)
    lengths = Lengths(prompt=200, response=4000, longest=4000, per_pass=2.0)
    seconds = seconds_of_step(asked, planned.config, planned.split, planned.memory, lengths)
    weights = asked.student.shape.parameters * 2
    cache = 2 * 36 * 8 * 128 * 2 * 2200
    assert seconds["rollout"] == pytest.approx(2001 * (weights + cache) / 4.8e12 / 0.6, rel=0.1)
    flops = asked.counter.count(lengths, recompute="true").update_flops
    assert seconds["update"] == pytest.approx(flops / 989e12 / 0.4, rel=0.25)
    slow = own(question("opdlm_8b", gpu="a100")).seconds
    fast = own(question("opdlm_8b", gpu="b200")).seconds
    assert all(fast[phase] < slow[phase] for phase in ("rollout", "teacher", "update"))


def test_the_best_layout_comes_first_and_more_gpus_are_faster():
    one, two = (search(question("opdlm_8b", gpus=n))[0] for n in (8, 16))
    totals = [sum(planned.seconds.values()) for planned in one]
    assert totals == sorted(totals) and len(totals) > 3
    assert sum(two[0].seconds.values()) < totals[0]
    assert max(planned.split.tensor for planned in two) == 8  # of one machine


def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    monkeypatch.setattr("sys.argv", ["opdlm plan", *argv])
    run.main()
    return capsys.readouterr().out


def test_the_command_prints_text_or_an_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Claim: both say the same hours, and that nothing was measured."""
    recipe = str(CONFIGS / "opdlm_0.6b.yaml")
    argv = (recipe, "--gpus", "8", "--gpu", "h200", "--top", "1", "curriculum.kind=constant")
    text = plan(capsys, monkeypatch, *argv)
    said = json.loads(plan(capsys, monkeypatch, *argv, "--json"))
    assert "nothing of this was measured on a GPU" in text and "by its datasheet" in text
    assert f"480 steps: {said['recipe']['hours']:.1f} hours" in text
    assert said["recipe"]["gpu_hours"] == pytest.approx(8 * said["recipe"]["hours"])
    assert said["recipe"]["trained_tokens"] == pytest.approx(480 * 128 * 1068)
    assert said["recipe"]["flops_paper"] == pytest.approx(
        8 * 596_049_920 * said["recipe"]["trained_tokens"]
    )
    assert len(said["layouts"]) == 1 and said["layouts"][0]["does_not_fit"] is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--gpu", "h20", "--gpus", "8"], "--gpu h20 is not known.*use h200, h100"),
        (["--gpu", "h200", "--gpus", "0"], "--gpus 0: use 1 or more"),
        (
            ["--gpu", "h200", "--gpus", "8", "train.steps=-1", "train.stop_after=null"],
            "give --steps N",
        ),
        (["--gpu", "h200", "--gpus", "8", "--tokens-per-pass", "9"], "at most 4 tokens"),
        (["--gpu", "h200", "--gpus", "8", "--measured", "nowhere"], "no directory of a run"),
        (["--gpu", "h200", "--gpus", "8", "model.path=checkpoints/x"], "x is not a directory"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    keys: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["opdlm plan", str(CONFIGS / "opdlm_8b.yaml"), *keys])
    with pytest.raises(InputError, match=message) as error:
        run.main()
    assert "\n" not in str(error.value)


def test_a_run_on_the_same_gpu_corrects_the_seconds(tmp_path: Path):
    """Claim: seconds that are twice, three and four times what is computed are factors of 2, 3 and
    4; the first step does not count; a run of another GPU is refused."""
    asked = question("opdlm_8b", response=500, per_pass=2.0)
    planned, lengths = own(asked), Lengths(prompt=200, response=500, longest=800, per_pass=2.0)
    seconds = seconds_of_step(asked, planned.config, planned.split, planned.memory, lengths)
    row = {
        "mean_response_tokens": 500,
        "max_new_tokens": 800,
        "tokens_per_denoising_step": 2.0,
        "seconds_rollout": 2 * seconds["rollout"],
        "seconds_teacher": 3 * seconds["teacher"],
        "seconds_update": 4 * seconds["update"],
    }
    first = row | {name: math.inf for name in row if name.startswith("seconds")}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
    (tmp_path / "config.yaml").write_text(to_yaml(asked.config))
    start = {"world_size": 8, "devices": ["NVIDIA H200"] * 8}
    (tmp_path / "environment.json").write_text(json.dumps([start]))
    found = corrections(tmp_path, asked.machine, asked.hardware, prompt=200)
    assert found == pytest.approx({"rollout": 2, "teacher": 3, "update": 4}, rel=1e-6)
    other = Machine(gpu=ACCELERATORS["b200"], efficiency=ASSUMED, per_node=8)
    with pytest.raises(InputError, match="ran on NVIDIA H200, not on B200"):
        corrections(tmp_path, other, asked.hardware, prompt=200)
