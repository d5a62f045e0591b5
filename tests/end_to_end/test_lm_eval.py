"""lm-evaluation-harness on an export: the same responses and the same accuracy as our own commands,
stop strings cut, and what cannot be asked refused in one line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("sacrebleu")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from checkpoint_tools import export_hf
from evaluation.lm_eval_model import OpdlmModel, cut_before
from evaluation.run import evaluate, load_tasks
from evaluation.sample import sample
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from megatron_opdlm.generator import load_generator
from tests.conftest import TinyModels

QUESTIONS = ("a", "bc", "1+2=", "xyz?", "0", "what")
LIMIT = 9  # response tokens
DECODING = Decoding(max_new_tokens=LIMIT, denoising_steps=2)
TASK = """\
task: own_rows
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: {limit}, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def export(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported directory, which says itself what its mask token and blocks are."""
    out = tmp_path_factory.mktemp("export") / "a2d"
    checkpoint = models.imported("student", tied=True)
    with pytest.MonkeyPatch.context() as patch:
        options = ("--checkpoint", checkpoint, "--out", out, "--format", "a2d-qwen3")
        patch.setattr(sys, "argv", ["export_hf", *map(str, options)])
        export_hf.main()
    return out


@pytest.fixture(scope="module")
def made(export: Path) -> list[dict[str, Any]]:
    """What ``evaluation.sample`` answers."""
    rows = [{"question": question} for question in QUESTIONS]
    return sample(load_generator(export), rows, DECODING, "test")


@pytest.fixture(scope="module")
def data(made: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other answer is right."""
    directory = tmp_path_factory.mktemp("data")
    rows = [
        {"question": row["question"], "answer": row["response"] if i % 2 else "no"}
        for i, row in enumerate(made)
    ]
    (directory / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def write_task(directory: Path, data: Path, until: list[str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = TASK.format(
        rows=data / "own.jsonl", cache=directory / "cache", until=json.dumps(until), limit=LIMIT
    )
    (directory / "own_rows.yaml").write_text(text)
    return directory


def harness(export: Path, tasks: Path) -> dict[str, Any]:
    results = simple_evaluate(
        model="opdlm",
        model_args={"pretrained": str(export), "denoising_steps": 2},
        tasks=["own_rows"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert results is not None
    return results


def responses(results: dict[str, Any]) -> list[str]:
    samples = sorted(results["samples"]["own_rows"], key=lambda row: row["doc_id"])
    return [row["resps"][0][0] for row in samples]


def test_same_responses_and_accuracy_as_our_commands(
    export: Path, made: list[dict[str, Any]], data: Path, tmp_path: Path
):
    """Claim: the harness sees the texts of ``evaluation.sample``, and its exact match is the
    accuracy of ``evaluation.run``'s task over the same rows."""
    results = harness(export, write_task(tmp_path, data, []))
    assert responses(results) == [row["response"] for row in made]
    [summary], _ = evaluate(
        load_generator(export), load_tasks(["exact_match:own"], data, None), DECODING, 1, {}
    )
    assert summary["accuracy"] == 0.5
    assert results["results"]["own_rows"]["exact_match,none"] == summary["accuracy"]


def test_stop_strings_cut_the_text(
    export: Path, made: list[dict[str, Any]], data: Path, tmp_path: Path
):
    """Claim: each text ends before the first of its stop strings; the last character of the first
    response is one of them."""
    stops = [made[0]["response"][-1], "??"]
    found = responses(harness(export, write_task(tmp_path, data, stops)))
    assert found == [row["response"].partition(stops[0])[0].partition("??")[0] for row in made]
    assert found[0] != made[0]["response"]
    assert cut_before("a\n\nQ: b", ["Q:", "\n"]) == "a"
    assert cut_before("a", []) == "a"


def request(context: str, kind: str = "generate_until", **arguments: Any) -> Instance:
    return Instance(
        request_type=kind,  # type: ignore[arg-type]
        doc={},
        arguments=(context, arguments),
        idx=0,
        metadata=("own", 0, 2),
    )


def test_requests_have_their_own_settings_and_draws(export: Path):
    """Claim: length and temperature are each request's; a document that is asked twice is drawn
    apart, and draws are repeatable."""
    model = OpdlmModel(str(export), max_new_tokens=12)
    drawn = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12}
    asked = [request("ab", **drawn), request("ab", **drawn), request("ab", max_gen_toks=3)]
    first = model.generate_until(asked)
    assert first == model.generate_until(asked)
    assert first[0] != first[1]
    assert len(first[2]) <= 3
    assert model.generate_until([request("a" * 2000, max_gen_toks=3)])  # cut on the left


def test_what_it_cannot_do_is_one_line(export: Path):
    """Claim: likelihoods, unknown generation arguments and unknown model arguments name themselves
    and what to use."""
    with pytest.raises(InputError, match="block_size"):
        OpdlmModel(str(export), block_sise=4)
    with pytest.raises(InputError, match="pretrained=DIR"):
        OpdlmModel()
    model = OpdlmModel(str(export))
    with pytest.raises(InputError, match="generative tasks"):
        model.loglikelihood([request("a", "loglikelihood")])
    with pytest.raises(InputError, match=r"repetition_penalty=1\.5.*--gen_kwargs"):
        model.generate_until([request("a", repetition_penalty=1.5)])
    with pytest.raises(InputError, match="penalty_alpha"):
        model.generate_until([request("a", penalty_alpha=0.5)])
    with pytest.raises(InputError, match="leaves no room"):
        model.generate_until([request("a", max_gen_toks=4096)])


@pytest.mark.slow
def test_the_command_on_two_ranks(
    export: Path, made: list[dict[str, Any]], data: Path, tmp_path: Path
):
    """Claim: under torchrun one process speaks and writes the results, which are the same."""
    tasks = write_task(tmp_path / "tasks", data, [])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", "-m", "evaluation.lm_eval_model", "--model", "opdlm"),
            *("--model_args", f"pretrained={export},denoising_steps=2,tp=2"),
            *("--tasks", "own_rows", "--include_path", tasks, "--apply_chat_template"),
            *("--output_path", tmp_path / "out", "--log_samples"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("|own_rows") == 1
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["own_rows"]["exact_match,none"] == 0.5
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])] == [
        row["response"] for row in made
    ]
