"""evaluation.download: which file comes from where, what is prepared, and what a failure says."""

import gzip
import io
import json
import urllib.request

import huggingface_hub
import pytest

from evaluation import download
from evaluation.grading.code_evalplus import HUMANEVAL, find_problems
from evaluation.tasks import PAPER_TASKS, get_task
from evaluation.tasks.codeforces_data import prepare
from megatron_opdlm.errors import InputError, RunError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose every file holds one row; records what was asked for."""
    asked = []

    def fetch(repository, filename, *, repo_type):
        asked.append((repository, filename, repo_type))
        cached = tmp_path / "cached.json"
        cached.write_text('[{"question": "q", "ground_truth_answer": "A"}]')
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return asked


def test_files_come_from_the_published_repositories_and_are_fetched_once(tmp_path, hub):
    """Every task of the paper but Codeforces is one file of the evaluation repository."""
    data = tmp_path / "data"
    data.mkdir()
    assert download.fetch(get_task("MATH-500"), data) == "MATH-500: MATH500.json fetched, 1 rows"
    assert download.fetch(get_task("MATH-500"), data) == "MATH-500: MATH500.json was there, 1 rows"
    download.fetch(get_task("opdlm_train"), data)
    assert hub == [
        ("divelab/opdlm_eval_data", "MATH500.json", "dataset"),
        ("divelab/opdlm_train_data", "opdlm_train.json", "dataset"),
    ]
    assert sorted(path.name for path in data.iterdir()) == ["MATH500.json", "opdlm_train.json"]


@pytest.fixture
def release(tmp_path, monkeypatch):
    """EvalPlus' releases, whose every file is this one, and no file in EvalPlus' cache."""
    asked = []
    answer = {"bytes": gzip.compress(b'{"task_id": "HumanEval/0"}\n')}

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(answer["bytes"])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    return asked, answer


def test_evalplus_tests_are_kept_with_the_data(tmp_path, hub, release):
    """So that copying the data directory is enough; half a file leaves nothing; once is enough."""
    asked, answer = release
    data = tmp_path / "data"
    data.mkdir()
    whole, answer["bytes"] = answer["bytes"], answer["bytes"][:-9]
    with pytest.raises(RunError, match="what HumanEval is graded with cannot be fetched"):
        download.fetch(get_task("HumanEval"), data)
    assert [path.name for path in data.iterdir()] == ["HumanEval.json"]
    answer["bytes"] = whole
    for _ in range(2):
        download.fetch(get_task("HumanEval"), data)
    assert asked == [HUMANEVAL.url] * 2
    assert HUMANEVAL.url.endswith("releases/download/v0.1.10/HumanEvalPlus.jsonl.gz")
    assert list(find_problems(HUMANEVAL, data)) == ["HumanEval/0"]
    assert not (tmp_path / "cache").exists()


def test_evalplus_own_cache_is_copied_and_read_after_the_data(tmp_path, hub, release):
    data, cache = tmp_path / "data", tmp_path / "cache/evalplus"
    data.mkdir()
    cache.mkdir(parents=True)
    (cache / "HumanEvalPlus-v0.1.10.jsonl").write_text('{"task_id": "HumanEval/1"}')
    assert list(find_problems(HUMANEVAL, data)) == ["HumanEval/1"]
    download.fetch(get_task("HumanEval"), data)
    (cache / "HumanEvalPlus-v0.1.10.jsonl").write_text('{"task_id": "HumanEval/2"}')
    assert list(find_problems(HUMANEVAL, data)) == ["HumanEval/1"]
    assert release[0] == []


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """Without a network the error says where to run it; a set that is not published says so."""

    def refuse(*_args, **_options):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        RunError, match=r"GSM8K\.json of divelab/opdlm_eval_data.*no route\)"
    ) as error:
        download.fetch(get_task("GSM8K"), tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="has no published file"):
        download.fetch(get_task("GSM8K_train"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_missing_file_names_this_command(tmp_path):
    """The remedy of each of the paper's tasks fetches that task."""
    for name in PAPER_TASKS:
        with pytest.raises(InputError, match=f"evaluation.download.*{name}"):
            get_task(name).load(tmp_path)


PROBLEM = {
    "id": "1/A",
    "title": "Sum",
    "description": "Add $$$a$$$ and $$$b$$$.\n",
    "input_format": "Two numbers.",
    "output_format": "Their sum.",
    "examples": [{"input": "1 2\n", "output": "3\n"}],
    "note": "It is $$$a+b$$$.",
    "time_limit": 1.5,
    "input_mode": "stdio",
    "executable": True,
    "interaction_format": None,
    "generated_checker": None,
    "official_tests": [{"input": "1 2\r\n", "output": "3\r"}],
    "rating": 800,
    "tags": ["math"],
}


def test_codeforces_keeps_what_a_judge_can_grade_and_writes_the_statement(tmp_path):
    """Sections in the page's order; 1.5 s become ceil(4.5) + 1 = 6; line ends are unified."""
    [row] = prepare(
        [
            PROBLEM,
            {**PROBLEM, "input_mode": "file"},
            {**PROBLEM, "executable": False},
            {**PROBLEM, "interaction_format": "ask"},
            {**PROBLEM, "generated_checker": "code"},
            {**PROBLEM, "official_tests": []},
        ]
    )
    assert row["question"] == (
        "Sum\n\nAdd $a$ and $b$.\n\nInput\nTwo numbers.\n\nOutput\nTheir sum.\n\nExamples\n\n"
        "Input\n1 2\nOutput\n3\n\nNote\nIt is $a+b$."
    )
    assert (row["test_input"], row["test_output"]) == (["1 2\n"], ["3\n"])
    assert row["test_time_limit"] == 6
    (tmp_path / "Codeforces.json").write_text(json.dumps([row]))
    assert get_task("Codeforces").load(tmp_path) == [row]
