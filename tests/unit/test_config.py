"""The configuration is strict: what it accepts comes back whole, what it refuses says why."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.config import (
    Config,
    OptimizerConfig,
    TrainConfig,
    differing_keys,
    flatten,
    load_config,
    require,
    to_yaml,
)
from megatron_opdlm.errors import InputError
from megatron_opdlm.keys import keys_of, types_of

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "configs").glob("[!_]*.yaml"))


def write(directory: Path, text: str) -> Path:
    file = directory / "run.yaml"
    file.write_text(text)
    return file


def test_defaults_without_a_file():
    assert load_config(None, []) == Config()


def test_file_beats_defaults_and_overrides_beat_the_file(tmp_path):
    file = write(tmp_path, "optimizer: {lr: 3e-4, batch_size: 16}\ntrain:\n  steps: 7\n")
    config = load_config(file, ["optimizer.batch_size=32", "train.seed=0"])
    assert config.optimizer == OptimizerConfig(lr=3e-4, batch_size=32)
    assert config.train == TrainConfig(steps=7, seed=0)
    assert config.rollout == Config().rollout


def test_later_override_wins():
    assert load_config(None, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.clip_grad=2", "optimizer.clip_grad", 2.0),
        ("model.sequence_parallel=false", "model.sequence_parallel", False),
        ("model.mask_token_id=151669", "model.mask_token_id", 151669),
        ("model.mask_token_id=null", "model.mask_token_id", None),
        ("train.out=runs/a=b", "train.out", "runs/a=b"),
        ("train.out=", "train.out", ""),
        # text as it stands, numbers as people write them
        ("train.out=runs/exp #2", "train.out", "runs/exp #2"),
        ("train.out=&x", "train.out", "&x"),
        ("train.out=@x", "train.out", "@x"),
        ("train.out=[draft]/x: y", "train.out", "[draft]/x: y"),
        ("train.out=null", "train.out", "null"),
        ("train.out=???", "train.out", "???"),
        ("train.out='1e-5'", "train.out", "'1e-5'"),
        ("train.out=0x10", "train.out", "0x10"),
        ("train.seed=010", "train.seed", 10),
        ("train.seed=1_000", "train.seed", 1000),
        ("optimizer.lr=1e-05", "optimizer.lr", 1e-5),
        ("data.shuffle=no", "data.shuffle", False),
        ("evaluation.tasks=[]", "evaluation.tasks", []),
        ("evaluation.tasks=[]", "evaluation.tasks", []),
        (
            "rollout.max_new_tokens_by_domain.math=4096",
            "rollout.max_new_tokens_by_domain",
            {"math": 4096},
        ),
        (
            "rollout.max_new_tokens_by_domain={math: 4096, code: 2048}",
            "rollout.max_new_tokens_by_domain",
            {"math": 4096, "code": 2048},
        ),
    ],
)
def test_override_values_are_yaml_of_the_keys_type(override, key, expected):
    value = flatten(load_config(None, [override]))[key]
    assert value == expected
    assert type(value) is type(expected)


def test_value_may_refer_to_another_key():
    config = load_config(None, ["model.path=hf/teacher", "train.out=${model.path}-${train.seed}"])
    assert config.train.out == "hf/teacher-10086"


def test_home_is_expanded_in_every_path_key(monkeypatch: pytest.MonkeyPatch):
    """Claim: no directory is ever called ~."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = [
        f"{section.name}.{name}"
        for section in dataclasses.fields(Config)
        for name, knowledge in keys_of(types_of(Config)[section.name]).items()
        if knowledge.is_path
    ]
    expected = [key for key in flatten(Config()) if key.endswith((".path", ".out", ".data"))]
    assert paths == expected
    config = load_config(None, [*(f"{key}=~/x" for key in paths), "mixing.fraction=1"])
    assert {flatten(config)[key] for key in paths} == {"/home/me/x"}
    assert load_config(None, ["train.out=~"]).train.out == "/home/me"


def test_a_file_means_what_it_says(tmp_path: Path):
    """Claim: YAML 1.1's octal, sexagesimal and truth values are no surprises in files either."""
    text = "train: {seed: 010, out: 12:30:45}\nlogging: {wandb_project: off}\nloss: {top_k: 1_6}\n"
    config = load_config(write(tmp_path, text), [])
    assert (config.train.seed, config.train.out) == (10, "12:30:45")
    assert (config.logging.wandb_project, config.loss.top_k) == ("off", 16)


def test_a_file_differs_from_its_base(tmp_path: Path):
    """Claim: mappings are laid over the base's key by key, lists and values replace its own; a base
    stands beside the file and may have a base."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "first.yaml").write_text("train: {seed: 1, steps: 5}\nlora: {rank: 3}\n")
    (tmp_path / "second.yaml").write_text(
        "base: b/first.yaml\ntrain: {seed: 2}\nlora: {targets: [linear_fc1]}\n"
    )
    file = write(tmp_path, "base: second.yaml\nlora: {targets: [linear_qkv]}\n")
    config = load_config(file, ["train.steps=6"])
    assert (config.train.seed, config.train.steps, config.lora.rank) == (2, 6, 3)
    assert config.lora.targets == ["linear_qkv"]
    assert "base" not in to_yaml(config)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("_generl.yaml", r"base: _generl\.yaml is no file in .* \(did you mean '_general\.yaml'"),
        ("run.yaml", r"run\.yaml: base: run\.yaml leads back to itself"),
        ("back.yaml", r"base back\.yaml: base: run\.yaml leads back to itself"),
        ("[a]", "must be the name of a file"),
        ("_bad.yaml", r"base _bad\.yaml: line 2: not valid YAML"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(tmp_path: Path, base: str, message: str):
    (tmp_path / "_general.yaml").write_text("train: {seed: 1}\n")
    (tmp_path / "back.yaml").write_text("base: run.yaml\n")
    (tmp_path / "_bad.yaml").write_text("train: [\n")
    with pytest.raises(InputError, match=message) as caught:
        load_config(write(tmp_path, f"base: {base}\n"), [])
    assert "\n" not in str(caught.value)


def test_section_without_keys_is_the_default(tmp_path):
    assert load_config(write(tmp_path, "model:\ntrain:\n  # steps: 3\n"), []) == Config()


BAD_OVERRIDES = [
    # keys that do not exist name the nearest one
    ("rolout.block_size=4", "'rolout.block_size' does not exist (did you mean 'rollout.block_siz"),
    ("rollout.blocksize=4", "'rollout.blocksize' does not exist (did you mean 'rollout.block_size"),
    ("lr=1", "'lr' does not exist (did you mean 'optimizer.lr'?)"),
    ("loss.lr=1", "'loss.lr' does not exist (did you mean 'optimizer.lr'?)"),
    ("tensor_parallel=2", "(did you mean 'model.tensor_parallel'?)"),
    ("model.path.x=1", "'model.path.x' does not exist (did you mean 'model.path'?)"),
    ("model=qwen", "model=qwen is a section; write model.KEY=value"),
    # forms
    ("train.steps", "override 'train.steps' is not of the form section.key=value"),
    ("=3", "override '=3' is not of the form section.key=value"),
    ("evaluation.tasks=[a", "override 'evaluation.tasks=[a': not valid YAML"),
    ("train.out=${nowhere}", "Interpolation key 'nowhere' not found"),
    # types
    ("model.tensor_parallel=two", "model.tensor_parallel=two must be an integer"),
    ("model.tensor_parallel=2.0", "model.tensor_parallel=2.0 must be an integer"),
    ("model.tensor_parallel=true", "model.tensor_parallel=true must be an integer"),
    ("model.mask_token_id=mask", "model.mask_token_id=mask must be an integer"),
    ("model.recompute=1", "model.recompute=1 must be one of false, true, attention, mlp"),
    ("optimizer.lr=fast", "optimizer.lr=fast must be a finite number"),
    ("optimizer.lr=.nan", "optimizer.lr=.nan must be a finite number"),
    ("optimizer.lr=.inf", "optimizer.lr=.inf must be a finite number"),
    ("train.out=a\0b", "holds a NUL character; remove it"),
    ("train.out=\udcff", "is not UTF-8; rename it"),
    ("train.out=~nobody-here/x", "home of nobody-here, who is no user here; write ./~nobody-here"),
    ("train.out=runs/~/x", "names a directory ~, which stands for your home at the begin only"),
    ("distributed.timeout_seconds=12:30", "timeout_seconds=12:30 must be an integer"),
    ("train.steps=1e3", "train.steps=1e3 must be an integer"),
    ("evaluation.tasks=gsm8k", "evaluation.tasks=gsm8k must be a list, such as [a, b]"),
    ("evaluation.tasks=[[a]]", 'evaluation.tasks[0]=["a"] must be text'),
    ("rollout.max_new_tokens_by_domain=9", "max_new_tokens_by_domain=9 must be a mapping"),
    ("rollout.max_new_tokens_by_domain.a=b", "max_new_tokens_by_domain.a=b must be an integer"),
    # enumerations
    ("loss.kind=foward_kl", "must be one of forward_kl, reverse_kl, mixed, jsd, nll (did you mean"),
    ("model.dtype=fp16", "model.dtype=fp16 must be one of auto, fp32, bf16"),
    ("curriculum.kind=exp", "curriculum.kind=exp must be one of linear, sin, cos, constant"),
    ("rollout.remasking=random", "must be one of low_confidence_static, low_confidence_dynamic, s"),
    ("states.mode=off", "states.mode=off must be one of one_per_block, all, random_mask"),
    # ranges
    ("rollout.block_size=0", "rollout.block_size=0 must be at least 1"),
    ("rollout.denoising_steps=0", "rollout.denoising_steps=0 must be at least 1"),
    ("model.max_positions=0", "model.max_positions=0 must be at least 1"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1 must be at least 0"),
    ("rollout.temperature=-0.5", "rollout.temperature=-0.5 must be at least 0"),
    ("optimizer.lr=0", "optimizer.lr=0.0 must be greater than 0"),
    ("rollout.threshold=1.01", "rollout.threshold=1.01 must lie in [0, 1]"),
    ("rollout.top_p=0", "rollout.top_p=0.0 must lie in (0, 1]"),
    ("rollout.top_p=1.5", "rollout.top_p=1.5 must lie in (0, 1]"),
    ("teacher.top_p=0", "teacher.top_p=0.0 must lie in (0, 1]"),
    ("teacher.temperature=0", "teacher.temperature=0.0 must be greater than 0"),
    ("optimizer.beta2=1", "optimizer.beta2=1.0 must lie in [0, 1)"),
    ("mixing.fraction=1.2", "mixing.fraction=1.2 must lie in [0, 1]"),
    ("mixing.steps=0", "mixing.steps=0 must be at least 1"),
    ("train.steps=0", "train.steps=0 must be at least 1, or -1 for all epochs of the data"),
    ("threshold_schedule.steps=-2", "must be at least 1, or -1 for to the end of the run"),
    ("rollout.max_new_tokens_by_domain.chat=0", "max_new_tokens_by_domain.chat=0 must be at least"),
    # agreement between keys: both numbers
    ("optimizer.min_lr=0.5", "optimizer.min_lr=0.5 exceeds optimizer.lr=1e-05; use at most 1e-05"),
    ("curriculum.start=5000", "curriculum.start=5000 exceeds curriculum.end=4000"),
    ("model.sequence_parallel=true", "but model.tensor_parallel=1; use more ranks or"),
    ("loss.top_k_tail=bucket", "loss.top_k_tail=bucket has no effect with loss.top_k=0 (the full"),
    ("loss.top_k_tail=none", "must be one of drop, renormalise, bucket"),
    ("evaluation.tasks=[addition]", "need their data files; set evaluation.data=DIR"),
    ("evaluation.every=10", "evaluation.every=10 evaluates nothing with evaluation.tasks=[]"),
    ("evaluation.every=-1", "evaluation.every=-1 must be at least 0"),
    ("evaluation.limit=0", "evaluation.limit=0 must be at least 1"),
    ("evaluation.max_new_tokens=0", "evaluation.max_new_tokens=0 must be at least 1"),
    ("evaluation.remasking=dynamic", "must be one of low_confidence_static"),
    ("evaluation.threshold=1.5", "evaluation.threshold=1.5 must lie in [0, 1]"),
    ("evaluation.top_p=0", "evaluation.top_p=0.0 must lie in (0, 1]"),
    ("evaluation.best_by=gsm8k", "evaluation.best_by=gsm8k is none of evaluation.tasks=[]"),
    ("lora.rank=-1", "lora.rank=-1 must be at least 0"),
    ("lora.alpha=0", "lora.alpha=0.0 must be greater than 0"),
    ("lora.dropout=0.1", "'lora.dropout' does not exist"),
    ("lora.targets=[linear_qkw]", "lora.targets[0]=linear_qkw must be one of linear_qkv"),
]


def test_packed_weights_stay_where_they_are():
    keys = ["teacher.quantization=fp8", "teacher.offload_weights=true"]
    with pytest.raises(InputError, match=r"teacher\.quantization=fp8; use one of the two"):
        load_config(None, keys)


def test_the_best_is_by_one_of_the_tasks():
    keys = ["evaluation.tasks=[GSM8K, MMLU]", "evaluation.data=d", "evaluation.best_by=GSM8k"]
    with pytest.raises(InputError, match=r"none of .*MMLU.*did you mean 'GSM8K'"):
        load_config(None, keys)
    assert load_config(None, [*keys[:2], "evaluation.best_by=MMLU"]).evaluation.best_by == "MMLU"


def test_low_rank_terms_stand_somewhere():
    with pytest.raises(InputError, match=r"lora\.targets=\[\] must name .* lora\.rank=4; use"):
        load_config(None, ["lora.rank=4", "lora.targets=[]"])


@pytest.mark.parametrize(("override", "fragment"), BAD_OVERRIDES)
def test_bad_value_is_refused_in_one_line_with_the_reason(override, fragment):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (
            ["threshold_schedule.enabled=true", "rollout.remasking=sequential"],
            "has no effect with rollout.remasking=sequential",
        ),
        (
            ["threshold_schedule.enabled=true", "train.steps=100"],
            "threshold_schedule.hold_steps=150 leaves no step of train.steps=100",
        ),
        (
            ["loss.reverse_weight=0.5", "loss.kind=jsd"],
            "loss.reverse_weight=0.5 has no effect with loss.kind=jsd; use loss.kind=mixed",
        ),
        (
            ["loss.kind=nll", "loss.top_k=16"],
            "loss.top_k=16 has no effect with loss.kind=nll, which asks no teacher; use loss.top_k",
        ),
        (
            ["loss.kind=nll", "teacher.temperature=2"],
            "teacher.temperature=2.0 has no effect with loss.kind=nll",
        ),
        (
            ["loss.kind=mixed", "loss.reverse_weight=0.5", "teacher.top_p=0.9"],
            "teacher.top_p=0.9 takes tokens from the teacher, where loss.kind=mixed is infinite",
        ),
        (
            ["loss.kind=jsd", "loss.jsd_alpha=1"],
            "loss.jsd_alpha=1.0 makes every Jensen-Shannon divergence 0; use a number between",
        ),
        (
            ["mixing.fraction=0.5", "mixing.end_fraction=0.2"],
            "mixing.end_fraction=0.2 has no effect with mixing.kind=constant; use linear",
        ),
        (
            ["mixing.path=more.jsonl"],
            "mixing.path=more.jsonl has no effect with mixing.fraction=0; use a fraction",
        ),
        (
            ["model.max_positions=512", "data.max_prompt_tokens=512"],
            "data.max_prompt_tokens=512 leaves no room for a response within model.max_pos",
        ),
    ],
)
def test_disagreement_between_two_keys_names_both(overrides, fragment):
    with pytest.raises(InputError, match="=") as caught:
        load_config(None, overrides)
    assert fragment in str(caught.value)


def test_rules_that_do_not_apply_do_not_fire():
    load_config(None, ["curriculum.kind=constant", "curriculum.start=5000"])
    load_config(None, ["threshold_schedule.enabled=true", "train.steps=151"])
    load_config(None, ["loss.kind=mixed", "loss.reverse_weight=0.5"])
    load_config(None, ["loss.kind=jsd", "teacher.top_p=0.9", "loss.top_k=16"])
    load_config(None, ["rollout.block_size=8", "rollout.denoising_steps=8"])
    load_config(None, ["model.sequence_parallel=true", "model.tensor_parallel=2"])


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("model: {path: a\ntrain: 3\n", "line 2: not valid YAML"),
        ("train:\n\tsteps: 3\n", "line 2: not valid YAML"),
        ("train: {steps: 3}\ntrain: {seed: 1}\n", "duplicate key train"),
        ("- a\n- b\n", "must hold sections"),
        ("just words\n", "must hold sections"),
        ("1: 2\n", "configuration key '1' does not exist"),
    ],
)
def test_malformed_file_is_refused_by_name(tmp_path, text, fragment):
    file = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(file, [])
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml", [])
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path, [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(InputError, match=r"binary\.yaml"):
        load_config(binary, [])


def test_yaml_of_a_configuration_reads_back_equal(tmp_path):
    config = load_config(
        None,
        [
            "model.path=1e-5",
            "train.out=true",
            "data.path=a: b # c  d",
            r"teacher.path=\${a} \${b",
            "mixing.path=null",
            "mixing.fraction=0.5",
            "evaluation.best_by=010",
            "evaluation.data=d",
            "evaluation.tasks=[010, off, '[a]']",
            "optimizer.lr=2.5e-05",
            "model.mask_token_id=7",
            "rollout.max_new_tokens_by_domain={math: 12, 'on': 3}",
        ],
    )
    assert load_config(write(tmp_path, to_yaml(config)), []) == config


def test_flatten_has_every_key_once_in_order():
    keys = list(flatten(Config()))
    expected = [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), section.name))
    ]
    assert keys == expected
    assert keys[0] == "model.path"
    assert "rollout.max_new_tokens_by_domain" in keys


def test_differing_keys():
    a = load_config(None, ["train.seed=1", "rollout.max_new_tokens_by_domain.math=3"])
    assert differing_keys(a, Config()) == ["rollout.max_new_tokens_by_domain", "train.seed"]
    assert differing_keys(a, a) == []


def test_require_names_the_empty_key():
    config = load_config(None, ["model.path=hf"])
    require(config, "model.path")
    with pytest.raises(InputError, match=r"^train\.out is not set"):
        require(config, "model.path", "train.out")


def test_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_every_recipe_is_valid(recipe):
    load_config(recipe, [])


def test_there_is_a_recipe():
    assert RECIPES


def test_a_configuration_is_read_without_torch():
    code = "import sys, megatron_opdlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
