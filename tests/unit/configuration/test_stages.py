"""``stages`` of a recipe: what each stage's configuration is, and what a list may not be."""

from pathlib import Path

import pytest

from megatron_opdlm import train
from megatron_opdlm.config import differing_keys, load_config, stages_of
from megatron_opdlm.errors import InputError

WHOLE = """
train: {steps: 9, seed: 5}
rollout: {block_size: 8}
curriculum: {kind: cos}
stages:
  - kind: answer
    rollout: {temperature: 0.5}
  - kind: warm_up
    train: {steps: 3}
    loss: {kind: nll}
  - kind: distil
  - kind: distil
    name: larger
    rollout: {block_size: 16}
    train: {seed: 1}
"""


def written(place: Path, text: str) -> Path:
    file = place / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_stage_is_the_recipe_with_its_own_keys(tmp_path):
    """Claim: the file's keys, then those of the kind, then the stage's, then the command line's;
    each draws with a seed of its own unless it names one."""
    file = written(tmp_path, WHOLE)
    assert [entry.name for entry in stages_of(file)] == ["answer", "warm_up", "distil", "larger"]
    common, answer = load_config(file, []), load_config(file, [], "answer")
    assert differing_keys(common, answer) == ["rollout.temperature"]
    warm_up = load_config(file, [], "warm_up")
    assert (warm_up.mixing.fraction, warm_up.curriculum.kind) == (1.0, "constant")
    assert (warm_up.train.steps, warm_up.loss.kind, warm_up.train.seed) == (3, "nll", 6)
    assert differing_keys(common, load_config(file, [], "distil")) == ["train.seed"]
    larger = load_config(file, [], "larger")
    assert (larger.rollout.block_size, larger.train.seed, larger.train.steps) == (16, 1, 9)
    given = ["train.steps=7", "train.seed=20", "stages.larger.train.steps=2"]
    wanted = {"warm_up": (7, 21), "distil": (7, 22), "larger": (2, 20)}
    for name, expected in wanted.items():
        found = load_config(file, given, name).train
        assert (found.steps, found.seed) == expected


REFUSED = {
    "stages: 3": "stages is a list of at least one stage",
    "stages: []": "stages is a list of at least one stage",
    "stages: [distil]": "stage 1 is a mapping with a 'kind', one of answer, warm_up, distil",
    "stages: [{name: a}]": "stage 1 is a mapping with a 'kind'",
    "stages: [{kind: warmup}]": "stage 1: kind 'warmup' is none of .*did you mean 'warm_up'",
    "stages: [{kind: distil, rollot: {}}]": "stage 1: no key 'rollot'.*did you mean 'rollout'",
    "stages: [{kind: distil}, {kind: distil}]": "two stages are called distil; give each a 'name'",
    "stages: [{kind: distil, name: ../a}]": "stage 1: name '../a' is a directory's",
    "stages: [{kind: distil, train: 3}]": "stage 1: train=3 is a section",
    "stages: [{kind: distil, train: {out: a}}]": "stage 1: train.out is the pipeline's; leave it",
    "stages: [{kind: answer, evaluate: a}, {kind: warm_up}]": "evaluate=a is the file",
    "stages: [{kind: answer}]": "no stage trains; add one",
    "stages: [{kind: warm_up}]": "warm_up has no answers; put a stage of kind answer before it",
    "stages: [{kind: answer}, {kind: distil}]": "no stage of kind warm_up reads the answers of",
    "stages: [{kind: answer}, {kind: answer, name: b}, {kind: warm_up}]": "the answers of answer",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_list_that_cannot_be_run_is_refused_in_one_line(tmp_path, text):
    file = written(tmp_path, text)
    with pytest.raises(InputError, match=REFUSED[text]) as caught:
        load_config(file, [])
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_own_answers_need_no_answer_stage(tmp_path):
    file = written(tmp_path, "stages: [{kind: warm_up, data: {path: answers.jsonl}}]")
    assert load_config(file, [], "warm_up").data.path == "answers.jsonl"


def test_what_is_wrong_in_a_stage_names_it(tmp_path):
    text = WHOLE.replace("steps: 3", "stepz: 3")
    with pytest.raises(InputError, match=r"^stage warm_up: .*'train.stepz'.*'train.steps'"):
        load_config(written(tmp_path, text), [], "warm_up")
    file = written(tmp_path, WHOLE)
    for override, message in (
        ("stages.warmup.train.steps=1", "no stage 'warmup'.*did you mean 'warm_up'"),
        ("stages.warm_up", "not of the form stages.NAME.section.key=value"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(file, [override], "distil")


def test_training_takes_one_stage_of_a_recipe(tmp_path):
    """Claim: never the recipe without one, and none that does not train."""
    file = str(written(tmp_path, WHOLE))
    for arguments, message in (
        ([], "--stage is not given: .*warm_up, distil, larger; name one"),
        (["--stage", "answer"], "--stage answer: .*trains in the stages warm_up, distil, larger"),
    ):
        with pytest.raises(InputError, match=message):
            train.main(["--config", file, *arguments])
    plain = str(written(tmp_path, "train: {steps: 1}"))
    with pytest.raises(InputError, match=r"--stage a: .*has no stages; leave it out"):
        train.main(["--config", plain, "--stage", "a"])
