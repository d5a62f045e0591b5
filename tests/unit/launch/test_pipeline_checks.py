"""What launch/pipeline.sh refuses, allows and chooses before its first stage, in this process."""

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launch import pipeline
from launch.pipeline_checks import check_same_command, note_command
from launch.pipeline_settings import Settings, read_settings
from launch.stages import ROOT, Requests, Stage, Stages
from megatron_opdlm import train
from megatron_opdlm.config import to_yaml
from megatron_opdlm.errors import InputError, RunError, Stopped
from tests.conftest import MASK, TinyModels
from tests.training_run import write_prompts

RECIPE = ROOT / "configs" / "tiny_cpu.yaml"


@pytest.fixture
def place(models: TinyModels, tmp_path: Path) -> Path:
    """Benchmarks, prompts and a recipe of the evaluation in a folder of their own."""
    rows = [{"prompt": text, "answer": "c"} for text in ("ab", "ba")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "held_out.jsonl").write_text(text)
    write_prompts(tmp_path / "prompts.jsonl")
    evaluation = ROOT / "configs" / "evaluation" / "tiny_cpu.yaml"
    (tmp_path / "evaluation.yaml").write_text(evaluation.read_text())
    (tmp_path / "hf").symlink_to(models.hf("student", tied=True))
    (tmp_path / "other").symlink_to(models.hf("teacher", tied=True))
    (tmp_path / "experts").symlink_to(models.experts("student"))
    return tmp_path


def settings(
    place: Path, *more: str, recipe: Path = RECIPE, environ: Mapping[str, str] | None = None
) -> Settings:
    argv = [
        str(recipe),
        *("--hf", str(place / "hf"), "--data", str(place / "data"), "--out", str(place / "out")),
        *("--evaluation", str(place / "evaluation.yaml"), f"data.path={place / 'prompts.jsonl'}"),
    ]
    return read_settings(pipeline._parser().parse_intermixed_args([*argv, *more]), environ or {})


def experts(place: Path, *more: str) -> Settings:
    return settings(place, "--hf", str(place / "experts"), *more)


def command_of(stage: str, chosen: Settings) -> list[str]:
    (found,) = [one for one in pipeline.stages(chosen) if one.name == stage]
    return found.command()


def test_the_format_is_one_that_can_hold_what_the_recipe_makes(place):
    assert settings(place).format == "a2d-qwen3"
    assert experts(place).format == "sdar"
    for key in ("loss.logit_shift=true", "states.block_alignment=response"):
        assert settings(place, key).format == experts(place, key).format == "qwen3"


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        ("experts", ("--format", "a2d-qwen3"), "mixture of experts.*use --format sdar"),
        ("hf", ("--format", "sdar", "loss.logit_shift=true"), "use --format qwen3"),
        ("hf", ("--format", "a2d-qwen3", "states.block_alignment=response"), "use --format qwen3"),
        ("hf", ("--ranks", "0"), "--ranks 0: a whole number; use 1 or more"),
        ("hf", ("--tp", "0"), "--tp 0: .*use 1 or more"),
        ("hf", ("--tp", "3"), "tensor_parallel=3 does not divide .*--tp"),
        ("hf", ("--ep", "2"), "expert_parallel=2 shares out experts.*use expert_parallel=1"),
        ("hf", ("--tp", "2", "--ranks", "1"), "--tp 2 --ep 1: .*do not divide the 1 ranks"),
        ("hf", ("--limit", "0"), "--limit 0: .*use 1 or more"),
        ("hf", ("--mask-token-id", "-1"), "--mask-token-id -1: .*use 0 or more"),
        ("hf", ("--mask-token-id", "67"), "--mask-token-id 67: the model has 67 ids"),
        ("hf", ("--ranks", "3", "model.tensor_parallel=2"), "3 ranks cannot be split"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(place, hf, change, message):
    with pytest.raises(InputError, match=message):
        settings(place, "--hf", str(place / hf), *change)
    assert not (place / "out").exists()


def test_flags_reach_their_stages(place):
    """Claim: 0 is a token id, and experts are shared out over the evaluation's ranks as over
    training's, unless the flags say otherwise."""
    assert command_of("import", settings(place, "--mask-token-id", "0"))[-1] == "0"
    shared = experts(place, "model.expert_parallel=2", "--ranks", "2")
    assert command_of("evaluate", shared)[-4:] == ["--tp", "1", "--ep", "2"]
    own = experts(place, "model.expert_parallel=2", "--ranks", "2", "--ep", "1", "--limit", "3")
    assert command_of("evaluate", own)[-6:] == ["--tp", "1", "--ep", "1", "--limit", "3"]


def test_the_30b_recipe_is_exported_as_it_can_be(place):
    """Claim: a dry run of the advertised command, without weights, chooses experts' format."""
    recipe = ROOT / "configs" / "proposal_30b_a3b.yaml"
    chosen = settings(place, "--hf", "absent/Qwen3-30B-A3B", "--dry-run", recipe=recipe)
    assert (chosen.format, chosen.ep, chosen.world) == ("sdar", 8, None)


def test_ranks_of_many_nodes_are_counted_where_they_are_known(place):
    launcher = {"OPDLM_LAUNCHER": "srun 'my node.sh'"}
    chosen = settings(place, "--ranks", "4", environ={**launcher, "OPDLM_NODES": "2"})
    assert (chosen.launcher, chosen.world) == (["srun", "my node.sh", "--ranks", "4"], 8)
    assert settings(place, "--ranks", "4", environ=launcher).world is None
    with pytest.raises(InputError, match="OPDLM_LAUNCHER=srun 'x: No closing quotation"):
        settings(place, environ={"OPDLM_LAUNCHER": "srun 'x"})


def test_missing_inputs_are_all_named_before_the_first_stage(place):
    training = ("evaluation.every=1", "evaluation.tasks=[GSM8K]", "data.path=absent.jsonl")
    (place / "data" / "held_out.jsonl").unlink()
    with pytest.raises(InputError) as caught:
        pipeline.run_pipeline(settings(place, *training))
    for part in ("data.path=absent.jsonl", "GSM8K.json, which is missing", "held_out.jsonl"):
        assert part in str(caught.value)
    assert not (place / "out").exists()


def begun(place: Path, *outputs: str) -> None:
    """A directory of ``settings(place)`` with these outputs."""
    first = settings(place)
    (place / "out" / "run").mkdir(parents=True)
    for name in outputs:
        (place / "out" / name).mkdir()
    (first.last.run / "config.yaml").write_text(to_yaml(first.last.config))
    note_command(first)


def test_where_and_how_fast_may_change_but_not_what_is_trained(place, monkeypatch):
    begun(place)
    free = ("update.tokens_per_microbatch=64", "model.tensor_parallel=2", "logging.samples=1")
    check_same_command(settings(place, *free, "--ranks", "2"))
    monkeypatch.chdir(place)
    check_same_command(settings(place, "--out", "out", "--hf", "hf"))
    with pytest.raises(InputError, match=r"differs in train\.seed"):
        check_same_command(settings(place, "train.seed=1"))


@pytest.mark.parametrize(
    ("output", "change", "key"),
    [
        ("imported", ("--hf", "{place}/other"), "hf"),
        ("imported", ("--mask-token-id", "1"), "mask_token_id"),
        ("exported", ("--format", "sdar"), "format"),
        ("evaluation", ("--limit", "1"), "limit"),
        ("evaluation", ("--evaluation", "{place}/other.yaml"), "evaluation"),
    ],
)
def test_a_later_stage_may_change_until_it_has_begun(place, output, change, key):
    text = (place / "evaluation.yaml").read_text()
    (place / "other.yaml").write_text(text.replace("max_new_tokens: 24", "max_new_tokens: 16"))
    (place / "evaluation.yaml").write_text(text + "# a remark changes nothing\n")
    argv = [word.format(place=place) for word in change]
    outputs = ["imported", "exported", "evaluation"]
    begun(place, *outputs[: outputs.index(output)])
    check_same_command(settings(place, *argv))
    (place / "out" / output).mkdir()
    with pytest.raises(InputError, match=f"differs in {key}"):
        check_same_command(settings(place, *argv))
    check_same_command(settings(place))


def test_the_dry_run_goes_on_where_training_has_begun(place, models):
    """Claim: it shows the model of the run, and says how many ranks it assumes."""
    place.joinpath("out").mkdir()
    place.joinpath("out", "imported").symlink_to(models.imported("student", tied=True))
    chosen = settings(place, "--dry-run", "--mask-token-id", str(MASK))
    chosen.last.run.mkdir()
    (chosen.last.run / "config.yaml").write_text(to_yaml(chosen.last.config))
    note_command(chosen)
    text = pipeline.show(chosen)
    assert "8 ranks are assumed" in text and "ranks        8 = tensor 1" in text
    assert "import (complete, skipped)" in text


STAGES = """
base: {0}/configs/tiny_cpu.yaml
stages:
  - kind: answer
  - kind: warm_up
  - kind: distil
    evaluate: larger.yaml
    rollout: {{block_size: 8, denoising_steps: 8}}
"""


@pytest.fixture
def staged(place: Path) -> Path:
    """A recipe in stages, with an evaluation for its larger blocks."""
    text = (place / "evaluation.yaml").read_text()
    for key in ("block_size", "denoising_steps"):
        text = text.replace(f"{key}: 4", f"{key}: 8")
    (place / "larger.yaml").write_text(text)
    file = place / "staged.yaml"
    file.write_text(STAGES.format(ROOT))
    return file


def test_stages_hand_their_weights_on(place, staged):
    """Claim: before anything is there the commands say where it will be; a training that begins as
    another's student has the imported model for a teacher, one that has begun keeps its start."""
    chosen, out = settings(place, "rollout.top_k=7", recipe=staged), place / "out"
    answer = command_of("answer", chosen)
    assert {"--top-k=7", "--temperature=1.0", "--max-new-tokens=24"} < set(answer)
    warm_up, distil = chosen.trainings
    assert warm_up.config.data.path == str(out / "stages" / "answer" / "answers.jsonl")
    assert (warm_up.config.model.path, warm_up.config.teacher.path) == (str(out / "imported"), "")
    assert distil.config.model.path == str(warm_up.run / "checkpoints" / "LAST")
    assert distil.config.teacher.path == str(out / "imported")
    warm_up.directory.mkdir(parents=True)
    warm_up.trained.write_text('{"checkpoint": "step_0000009"}')
    assert distil.config.model.path == str(warm_up.run / "checkpoints" / "step_0000009")
    assert command_of("distil: evaluate", chosen)[2] == str(place / "larger.yaml")


def test_stages_that_do_not_go_together_are_refused(place, staged):
    for keys, message in (
        (("stages.distil.loss.logit_shift=true",), "have loss.logit_shift=False and True, but"),
        (("rollout.block_size=16",), "stage warm_up trains blocks of rollout.block_size=16"),
        (("stages.warm_up.loss.kind=null",), "stage warm_up: loss.kind"),
        (("stages.distill.train.steps=1",), "no stage 'distill'.*did you mean 'distil'"),
    ):
        with pytest.raises(InputError, match=message):
            settings(place, *keys, recipe=staged)


def test_answers_that_are_there_are_of_this_command(place, staged):
    chosen = settings(place, recipe=staged)
    answers = place / "out" / "stages" / "answer" / "answers.jsonl"
    answers.parent.mkdir(parents=True)
    note_command(chosen)
    other = settings(place, "stages.answer.rollout.temperature=0.5", recipe=staged)
    check_same_command(other)
    answers.touch()
    check_same_command(chosen)
    with pytest.raises(InputError, match=r"differs in answers of answer; .*remove answers\.jsonl"):
        check_same_command(other)


@pytest.mark.parametrize("stem", ["proposal_4b_stages", "proposal_4b_grown"])
def test_the_recipes_in_stages_dry_run(place, stem, monkeypatch):
    """Claim: without weights, data or a GPU, stage by stage."""
    monkeypatch.chdir(place)
    argv = [str(ROOT / "configs" / f"{stem}.yaml"), "--hf", "absent/Qwen3-4B", "--data", "absent"]
    args = pipeline._parser().parse_intermixed_args([*argv, "--out", "out", "--dry-run"])
    chosen = read_settings(args, {})
    text = pipeline.show(chosen)
    for training in chosen.trainings:
        assert f"stage        {training.name}\n" in text and f"--stage {training.name} " in text
    assert text.count("memory of the fullest rank") == len(chosen.trainings)
    assert chosen.last.config.rollout.block_size == (16 if "grown" in stem else 4)
    assert not (place / "out").exists()


def test_train_takes_keys_on_both_sides_of_a_flag(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--config", str(RECIPE), "train.seed=1", "--dry-run", "train.steps=7"])
    out = capsys.readouterr().out
    assert "steps        7 of" in out and "ranks        1 =" in out


def test_the_dry_run_knows_the_quickstarts_model(tmp_path):
    from launch.quickstart.teacher import MASK_ROW, build_model
    from megatron_opdlm.model_files.shape import read_shape
    from megatron_opdlm.run.dry_run import QUICKSTART_SHAPE

    build_model(0).config.save_pretrained(tmp_path)
    assert read_shape(QUICKSTART_SHAPE) == read_shape(tmp_path)
    stored, made = (
        json.loads((d / "config.json").read_text()) for d in (QUICKSTART_SHAPE, tmp_path)
    )
    for key in ("eos_token_id", "pad_token_id"):
        assert stored[key] == made[key]
    assert stored["mask_token_id"] == MASK_ROW


@pytest.fixture
def own_signals() -> Iterator[None]:
    """The pipeline's handlers do not stay."""
    numbers = signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def asking(then: str) -> list[str]:
    """A stage that asks the pipeline to stop and, when told to, does something and ends."""
    wait = "kill -TERM $PPID; while :; do sleep 0.05; done"
    return ["sh", "-c", f"trap '{then}' TERM; {wait}"]


@pytest.mark.parametrize(
    ("then", "saved", "expected"),
    [
        ("exit 75", 2, (Stopped, "was asked to stop; the same")),
        ("{step}; exit 1", 3, (Stopped, "has saved step 3 .the launcher's code 1 hides")),
        ("{step}; exit 1", 2, (RunError, "code 1, although it was asked to stop")),
        ("exit 1", 2, (Stopped, "had nothing to save .the launcher's code 1 hides")),
        ("exit 2", 2, (RunError, "code 2, although it was asked to stop")),
        ("trap - TERM; kill -TERM $$", 2, (Stopped, "ended at once")),
    ],
)
def test_a_failure_is_told_from_a_stop_by_what_the_run_has_left(
    tmp_path, own_signals, then, saved, expected
):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    checkpoint = tmp_path / "checkpoints" / f"step_{saved:07d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    step = f'printf "\\n{{\\"step\\": 3}}\\n" >>{metrics}'
    requests = Requests.listen()
    error, message = expected
    argv = asking(then.replace("{step}", step))
    stage = Stage(
        name="train", complete=lambda: False, command=lambda: argv, launched=True, run=tmp_path
    )
    with pytest.raises(error, match=message):
        pipeline._run(stage, Stages(), requests)


def test_a_stop_while_a_stage_ends_well_holds_the_next_one(place, own_signals, monkeypatch):
    """Claim: the first stage is finished, the second does not begin."""
    done = []
    first = Stage(
        name="first",
        complete=lambda: False,
        command=lambda: asking("exit 0"),
        finish=lambda: done.append("first"),
    )
    second = Stage(name="second", complete=lambda: False, command=lambda: pytest.fail("it began"))
    monkeypatch.setattr(pipeline, "stages", lambda _: [first, second])
    with pytest.raises(Stopped, match="asked to stop before stage second"):
        pipeline.run_pipeline(settings(place))
    assert done == ["first"]
