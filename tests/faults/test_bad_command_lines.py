"""What people type wrong, over all commands: one line with value, rule and remedy, exit code 2, and
nothing written. A sample of each command runs as its user would start it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MASK, TinyModels
from tests.faults.refusals import COMMANDS, Runner, assert_one_line
from tests.forking import REPOSITORY

SECONDS = 240  # for a command that only has to read its command line
GOOD = '{"question": "1+1=", "answer": "2"}\n'


@pytest.fixture(scope="module")
def model(models: TinyModels) -> Path:
    return models.hf("student", tied=True, layers=2)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a good prompts file, tasks, predictions and a file of somebody else."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "addition.jsonl").write_text(GOOD * 2)
    (tmp_path / "rows.jsonl").write_text('{"prompt_ids": [1, 2]}\n')
    (tmp_path / "predictions.jsonl").write_text('{"index": 0, "responses": ["#2"]}\n')
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("do not touch")
    (tmp_path / "file").write_text("x")
    return tmp_path


# Command line, with {} for the directory above -> what the error line must hold.
Case = tuple[str, list[str], tuple[str, ...]]

SAMPLE = ["--model", "MODEL", "--prompts", "{}/rows.jsonl", "--out", "{}/out.jsonl"]
SAMPLE += ["--mask-token-id", str(MASK)]
RUN = ["--model", "MODEL", "--tasks", "addition", "--data", "{}/data", "--out", "{}/out"]
SWEEP = ["--models", "MODEL", *RUN[2:]]
SCORE = ["--task", "addition", "--data", "{}/data", "--predictions", "{}/predictions.jsonl"]
SCORE += ["--out", "{}/out"]
TRAIN = ["model.path=MODEL", "data.path={}/rows.jsonl", "train.out={}/out"]
TRAIN += [f"model.mask_token_id={MASK}"]
REPLAY = ["--student", "MODEL", "--teacher", "MODEL", "--trajectories", "{}/rows.jsonl"]
REPLAY += ["--out", "{}/out.json"]
PREPARE = ["--source", "{}/rows.jsonl", "--tokenizer", "MODEL", "--out", "{}/out.jsonl"]
RECIPE = ["configs/evaluation/opdlm_8b.yaml", "--model", "MODEL", "--data", "{}/data"]
PIPELINE = ["configs/opdlm_8b.yaml", "--hf", "MODEL", "--data", "{}/data", "--out", "{}/out"]

FLAGS: list[Case] = [
    # nothing, or not enough, or too much
    *(
        (name, [], ("required|not set|usage|needs|no results", "--help|add|give"))
        for name in sorted(COMMANDS)
        if name != "quickstart"
    ),
    *((name, ["--no-such-flag"], ("--help",)) for name in sorted(COMMANDS)),
    ("inspect", ["{}/file"], ("file is not a directory", "give")),
    ("inspect", ["{}/thesis"], ("has no config.json", "give")),
    ("serve_check", ["--hf", "{}/thesis"], ("has no config.json",)),
    ("serve_check", ["--hf", "{}/nowhere"], ("nowhere", "give|not a directory")),
    ("import_hf", ["--hf", "MODEL", "--out", "{}/thesis"], ("already holds files", "choose")),
    ("import_hf", ["--hf", "MODEL", "--out", "MODEL"], ("already holds files", "choose")),
    ("import_hf", ["--hf", "MODEL", "--out", "{}/file"], ("is a file", "choose")),
    ("import_hf", ["--hf", "MODEL", "--out", "{}/file/x"], ("file is no directory", "choose")),
    (
        "import_hf",
        ["--hf", "MODEL", "--out", "/dev/null/x"],
        ("/dev/null is no directory", "choose"),
    ),
    ("import_hf", ["--hf", "MODEL", "--out", "{}/out", "--dtype", "fp16"], ("'fp16'", "bf16")),
    ("import_hf", ["--hf", "MODEL", "--out", "{}/o", "--mask-token-id", "x"], ("'x'", "--help")),
    ("import_hf", ["--hf", "MODEL", "--out", "{}/o", "--mask-token-id", "67"], ("67", "e.g.")),
    # decoding
    ("sample", [*SAMPLE, "--block-size", "0"], ("block.size", "0", "1")),
    ("sample", [*SAMPLE, "--denoising-steps", "0"], ("denoising.steps", "0")),
    ("sample", [*SAMPLE, "--max-new-tokens", "0"], ("max.new.tokens", "0")),
    ("sample", [*SAMPLE, "--max-new-tokens", "many"], ("--max-new-tokens", "'many'", "--help")),
    ("sample", [*SAMPLE, "--top-p", "0"], ("top.p", "0")),
    ("sample", [*SAMPLE, "--top-k", "-1"], ("top.k", "-1")),
    ("sample", [*SAMPLE, "--margins", "--temperature", "1"], ("--margins", "--temperature 0")),
    ("sample", [*SAMPLE, "--temperature", "nan"], ("temperature", "nan")),
    ("sample", [*SAMPLE, "--threshold", "nan"], ("threshold", "nan")),
    ("sample", [*SAMPLE, "--remasking", "static"], ("remasking", "'?static", "low_confidence")),
    ("sample", [*SAMPLE, "--mode", "ddlm"], ("mode", "ddlm", "diffusion")),
    ("sample", [*SAMPLE, "--tp", "0"], ("--tp 0", "at least 1")),
    ("sample", [*SAMPLE, "--tp", "3"], ("--tp 3", "start a multiple of 3")),
    ("sample", [*SAMPLE, "--mask-token-id", "-1"], ("--mask-token-id -1", "at least 0")),
    ("sample", [*SAMPLE, "--out", "{}/file"], ("file", "exists", "choose")),
    ("sample", [*SAMPLE, "--out", "{}/file/x"], ("file is no directory", "choose")),
    ("sample", [*SAMPLE, "--out", "{}/thesis"], ("thesis", "exists", "choose")),
    ("sample", [*SAMPLE, "--model", "{}/nowhere"], ("--model", "nowhere", "give")),
    (
        "sample",
        [*SAMPLE, "--prompts", "{}/data"],
        ("--prompts", "not a directory written by datasets"),
    ),
    # evaluation
    ("run", [*RUN, "--tasks", "gsm8"], ("gsm8", "did you mean 'GSM8K'|did you mean 'gsm8k'")),
    ("run", [*RUN, "--tasks", "addition", "addition"], ("twice", "once")),
    ("run", [*RUN, "--tasks", "exact_match:../etc"], ("plain file name", "use")),
    ("run", [*RUN, "--tasks", "GSM8K"], ("gsm8k|GSM8K", "missing", "download")),
    ("run", [*RUN, "--limit", "0"], ("--limit 0", "use 1 or more")),
    ("run", [*RUN, "--samples", "0"], ("--samples 0", "use 1")),
    ("run", [*RUN, "--data", "{}/nowhere"], ("addition", "missing")),
    ("run", [*RUN, "--out", "{}/thesis"], ("thesis", "not empty", "choose|belongs|another")),
    ("run", [*RUN, "--out", "{}/file/x"], ("file is no directory", "choose")),
    ("sweep", [*SWEEP, "--thresholds", "1.5"], ("threshold", "1.5")),
    ("sweep", [*SWEEP, "--block-sizes", "0"], ("block.size", "0")),
    ("sweep", [*SWEEP, "--models", "MODEL", "MODEL"], ("two are called", "NAME=DIR")),
    ("sweep", [*SWEEP, "--models", "../x=MODEL"], (r"'\.\./x'", "plain name")),
    ("sweep", [*SWEEP, "--models", "{}/nowhere"], ("nowhere", "give")),
    ("score", [*SCORE, "--task", "adition"], ("adition", "did you mean 'addition'")),
    ("score", [*SCORE, "--predictions", "{}/nowhere"], ("--predictions", "no such file", "give")),
    ("score", [*SCORE, "--out", "{}/thesis"], ("thesis", "not empty", "choose")),
    ("score", [*SCORE, "--out", "{}/file/x"], ("file is no directory", "choose")),
    ("report", ["{}/nowhere"], ("nowhere", "give")),
    ("report", ["{}/data"], ("holds no summary.json", "give")),
    ("report", ["{}/file"], ("not JSON", "give")),
    ("report", ["{}/file", "--out", "{}/thesis"], ("thesis", "not empty", "choose")),
    ("recipe", ["{}/nowhere.yaml", *RECIPE[1:], "--out", "{}/out"], ("does not exist", "configs/")),
    ("recipe", ["{}/file", *RECIPE[1:], "--out", "{}/out"], ("must hold sections",)),
    ("recipe", [*RECIPE, "--out", "{}/file"], ("is a file", "give")),
    ("recipe", [*RECIPE, "--out", "{}/out", "--limit", "0"], ("--limit 0", "use 1")),
    ("recipe", [*RECIPE, "--out", "{}/out", "--only", "xyz"], ("--only xyz", "no such run")),
    ("recipe", RECIPE, ("--out is needed", "--help")),
    ("download", ["--data", "{}/out", "--tasks", "gsm9k"], ("gsm9k", "did you mean")),
    ("download", ["--data", "{}/data", "--tasks", "exact_match"], ("has no published file",)),
    # training
    ("train", [*TRAIN, "rollout.block_sise=4"], ("did you mean 'rollout.block_size'",)),
    ("train", [*TRAIN, "optimizer.batch_size=0"], ("optimizer.batch_size=0", "at least 1")),
    ("train", [*TRAIN, "rollout.prompts_per_step=0"], ("prompts_per_step=0", "at least 1")),
    ("train", [*TRAIN, "train.steps"], ("'train.steps'", "section.key=value")),
    ("train", [*TRAIN, "optimizer.lr=" + "9" * 400], ("optimizer.lr", "finite number")),
    ("train", [*TRAIN, "model=[]"], ("is a section", "write")),
    ("train", [*TRAIN, "--config", "{}/nowhere.yaml"], ("nowhere.yaml", "configs/")),
    ("train", [*TRAIN, "--config", "{}/data"], ("cannot be read",)),
    ("train", [*TRAIN, "data.path={}/data"], ("data.path", "not a directory written by datasets")),
    ("train", [*TRAIN, "data.path={}/file"], ("unknown kind of file", "use")),
    ("train", [*TRAIN, "train.out={}/file/x"], ("train.out", "is no directory", "choose")),
    ("train", [*TRAIN, "train.out={}/thesis"], ("train.out", "choose another directory")),
    ("train", [*TRAIN, "--dry-run", "--world-size", "0"], ("world.size", "0")),
    ("train", [*TRAIN, "--dry-run", "--world-size", "-2"], ("world.size", "-2")),
    ("replay", [*REPLAY, "loss.kind=kl"], ("loss.kind", "forward_kl")),
    ("replay", [*REPLAY, "--out", "{}/thesis"], ("is a directory", "name a file")),
    ("replay", [*REPLAY, "--out", "{}/file/x"], ("file is no directory", "choose")),
    ("prepare_data", [*PREPARE, "--source", "opdlm_trian"], ("did you mean 'opdlm_train'",)),
    ("prepare_data", [*PREPARE, "--out", "{}/out.json"], ("ends in .jsonl", "needed")),
    ("prepare_data", [*PREPARE, "--out", "{}/rows.jsonl"], ("exists already", "choose")),
    ("prepare_data", [*PREPARE, "--out", "{}/file/x.jsonl"], ("file is no directory", "choose")),
    ("prepare_data", [*PREPARE, "--ngram", "0"], ("--ngram", "correct")),
    ("prepare_data", [*PREPARE, "--tokenizer", "{}/thesis"], ("no tokenizer", "give")),
    ("prepare_data", [*PREPARE, "--evaluation-data", "{}/nowhere"], ("no such directory",)),
    ("prepare_data", [*PREPARE, "--template", "maths"], ("'maths'", "by_domain")),
    # launching
    ("quickstart", ["--layout", "pp2"], ("--layout pp2", "use dp2 or tp2")),
    ("quickstart", ["--seed", "-1"], ("--seed -1", "use 0 or more")),
    ("quickstart", ["--out", "{}/thesis"], ("thesis", "not empty", "choose")),
    ("quickstart", ["--data", "{}/rows.jsonl"], ("go with --hf", "leave")),
    ("quickstart", ["--hf", "{}/nowhere"], ("--hf", "nowhere", "check")),
    ("quickstart", ["--out", "{}/o", "optimizer.rl=1"], ("optimizer.rl", "did you mean")),
    ("pipeline", [*PIPELINE, "--hf", "{}/nowhere"], ("--hf", "nowhere", "check")),
    ("pipeline", [*PIPELINE, "--out", "{}/file"], ("is a file", "give")),
    ("pipeline", [*PIPELINE, "--format", "gguf"], ("'gguf'", "a2d-qwen3")),
    ("pipeline", [*PIPELINE, "optimizer.rl=1"], ("optimizer.rl", "did you mean")),
    ("pipeline", ["{}/nowhere.yaml", *PIPELINE[1:]], ("nowhere.yaml",)),
]


def filled(arguments: list[str], place: Path, model: Path) -> list[str]:
    return [text.replace("{}", str(place)).replace("MODEL", str(model)) for text in arguments]


@pytest.mark.parametrize(
    ("name", "arguments", "patterns"),
    FLAGS,
    ids=[f"{name} {' '.join(arguments[-2:])[:60]}" for name, arguments, _ in FLAGS],
)
def test_in_this_process(
    runner: Runner,
    place: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: list[str],
    patterns: tuple[str, ...],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    runner.refuses(place, name, *filled(arguments, place, model), patterns=patterns)


ROWS: list[tuple[str, str, bytes, tuple[str, ...]]] = [
    ("sample", "prompts", b"", ("holds no rows", "give")),
    ("sample", "prompts", b"\x1f\x8b\x08 gzip", ("gzip", "unpack")),
    ("sample", "prompts", '{"prompt_ids": [1]}'.encode("utf-16"), ("UTF-16", "UTF-8")),
    ("sample", "prompts", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    ("sample", "prompts", b'{"prompt_ids": [1]}\n{"prompt_ids": [-1]}', ("line 2", "from 0")),
    ("sample", "prompts", b'{"prompt_ids": [67]}', ("67", "use ids from 0 to 66|0 to 66")),
    ("sample", "prompts", b'{"prompt_ids": [NaN]}', ("line 1", "token ids")),
    ("sample", "prompts", b'{"prompt_ids": ["1"]}', ("line 1", "token ids")),
    ("sample", "prompts", b'{"prompt_ids": []}', ("line 1", "is empty")),
    ("sample", "prompts", b'{"prompt_ids": [1], "prompt_ids": [2]}', ("stands twice",)),
    ("sample", "prompts", b'{"question": "a", "prompt_ids": [1]}', ("not both",)),
    ("sample", "prompts", b'{"prompt": "\\ud800"}', ("half of a character", "line 1")),
    ("sample", "prompts", b'{"messages": [{"role": "user"}]}', ("line 1", "content")),
    ("sample", "prompts", b"[" * 100_000, ("nested too deeply",)),
    ("sample", "prompts", b'[{"prompt_ids": [1]}]', ("line 1", "must be a JSON object")),
    ("score", "predictions", b'{"index": 2, "responses": ["a"]}', ("'index' is 2", "0 to 1")),
    ("score", "predictions", b'{"index": "0", "responses": ["a"]}', ("'index' is '0'",)),
    ("score", "predictions", b'{"index": true, "responses": ["a"]}', ("'index' is True",)),
    ("score", "predictions", b'{"index": 0, "responses": "a"}', ("'responses' must be a list",)),
    ("score", "predictions", b'{"index": 0, "responses": []}', ("at least one",)),
    ("score", "predictions", b'{"index": 0, "responses": [1]}', ("'responses' must be a list",)),
    ("score", "predictions", b'{"index": 0, "responses": ["a"]}\n' * 2, ("second time",)),
    ("score", "predictions", b'{"index": 0, "responses": ["a"], "task": "x"}', ("no rows of",)),
    (
        "score",
        "predictions",
        b'{"index": 0, "responses": ["a"], "finish_reason": ["a", "b"]}',
        ("'finish_reason'", "correct"),
    ),
    ("score", "task", b'{"question": "1+1="}', ("row 0", "'answer'", "write it with")),
    ("score", "task", b'{"question": 2, "answer": "2"}', ("row 0", "'question'")),
    ("score", "task", b"{}", ("row 0", "'question'")),
    ("replay", "states", b'{"prompt_ids": [1], "response_ids": [2], "masked": [2]}', ("masked",)),
    ("replay", "states", b'{"prompt_ids": 1, "response_ids": [2], "masked": [1]}', ("no list",)),
]


@pytest.mark.parametrize(("name", "role", "content", "patterns"), ROWS, ids=range(len(ROWS)))
def test_rows(
    runner: Runner,
    place: Path,
    model: Path,
    name: str,
    role: str,
    content: bytes,
    patterns: tuple[str, ...],
) -> None:
    """Claim: the first bad row is named by its place."""
    files = {"predictions": "predictions.jsonl", "task": "data/addition.jsonl"}
    (place / files.get(role, "rows.jsonl")).write_bytes(content)
    arguments = {"sample": SAMPLE, "score": SCORE, "replay": REPLAY}[name]
    more = [f"model.mask_token_id={MASK}"] if name == "replay" else []
    runner.refuses(place, name, *filled(arguments, place, model), *more, patterns=patterns)


SCRIPTS = [
    (["launch/setup.sh", "--gpus"], "unknown argument"),
    (["launch/setup.sh", "--python"], "needs a PATH"),
    (["launch/one_node.sh"], "no module to run"),
    (["launch/one_node.sh", "--rank", "2"], "unknown option"),
    (["launch/one_node.sh", "--ranks"], "needs a value"),
    (["launch/one_node.sh", "--ranks", "two", "megatron_opdlm.train"], "--ranks two"),
    (["launch/many_nodes.sh", "megatron_opdlm.train"], "are needed"),
    (["launch/many_nodes.sh", "--nodes"], "needs a value"),
    (["launch/many_nodes.sh", "--nodes", "x", "--rendezvous", "a:1", "m"], "--nodes x"),
]


@pytest.mark.parametrize(("arguments", "reason"), SCRIPTS, ids=[" ".join(a) for a, _ in SCRIPTS])
def test_scripts(arguments: list[str], reason: str) -> None:
    ended = subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert_one_line(ended.returncode, ended.stderr, 2, (reason,))


WITHOUT_TORCH = ("import_hf", "export_hf", "verify", "inspect", "train", "replay", "sample")
WITHOUT_TORCH += ("run", "score", "prepare_data", "quickstart", "pipeline")


def test_a_wrong_flag_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    """Claim: a mistyped command line costs no minutes of imports on a cluster's file system. One
    process asks all commands in turn, each with a flag that it does not know."""
    program = f"""
import importlib, sys
from megatron_opdlm.errors import InputError
for name in {[COMMANDS[name] for name in WITHOUT_TORCH]!r}:
    sys.argv = [name, "--no-such-flag"]
    try:
        importlib.import_module(name).main()
    except InputError:
        print(name, "torch" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert ended.stdout.split() == [
        text for name in WITHOUT_TORCH for text in (COMMANDS[name], "False")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_as_its_user_starts_it(name: str, tmp_path: Path) -> None:
    """Claim: the process itself ends with code 2 and says one line."""
    ended = subprocess.run(
        [sys.executable, "-m", COMMANDS[name], "--no-such-flag"],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert_one_line(ended.returncode, ended.stderr, 2, ("--help",))
    assert not ended.stdout
