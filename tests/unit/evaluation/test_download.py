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


def test_codeforces_rows_may_hold_nulls():
    """Claim: texts that are null count as empty; a problem without any is left out."""
    nulls = dict.fromkeys(("title", "description", "input_format", "output_format", "note"))
    bare = PROBLEM | nulls | {"examples": None}
    half = PROBLEM | {"description": None, "examples": [None, {"input": None, "output": "3"}]}
    half |= {"official_tests": [{"input": None, "output": "3"}], "time_limit": None, "tags": None}
    [row] = prepare([bare, half])
    assert row["question"].startswith("Sum\n\nInput\nTwo numbers.")
    assert "Examples\n\nInput\n\nOutput\n3" in row["question"]
    assert (row["test_input"], row["test_output"], row["tags"]) == ([""], ["3"], [])
    assert get_task("Codeforces").problem_of(row) is None


ASKED = {"question": "Q", "ground_truth_answer": "1,234"}
CHOICES = ["red", "green", "blue", "grey"]
OPTIONS = "Q\n(A) red\n(B) green\n(C) blue\n(D) grey"
INSTRUCTED = {"key": 3, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
CHECKED = {"entry_point": "f", "test": "def check(f): pass"}
# task, a row of its public file, the same in the paper's form
PUBLIC_ROWS = [
    ("GSM8K", {"question": "Q", "answer": "2 * 617 = 1,234\n#### 1,234"}, ASKED),
    ("MATH-500", {"problem": "Q", "solution": "so \\boxed{1,234}."}, ASKED),
    ("MATH-500", {"problem": "Q", "solution": "so", "answer": "1,234"}, ASKED),
    (
        "HumanEval",
        {"task_id": "HumanEval/0", "prompt": "def f():", **CHECKED},
        {"task_id": "HumanEval/0", "question": "def f():", **CHECKED},
    ),
    (
        "MBPP",
        {"task_id": 2, "prompt": "Do.", "code": "", "test_list": ["assert f(1) == 1", "b"]},
        {
            "task_id": "Mbpp/2",
            "question": '"""\nDo.\nassert f(1) == 1\n"""\n',
            "test_list": ["assert f(1) == 1", "b"],
        },
    ),
    ("IFEval", {"prompt": "Q", **INSTRUCTED}, {"question": "Q", **INSTRUCTED}),
    (
        "MMLU",
        {"question": "Q", "subject": "optics", "choices": CHOICES, "answer": 2},
        {"question": OPTIONS, "ground_truth_answer": "C", "subdivision": "optics"},
    ),
]


@pytest.mark.parametrize(("name", "public", "expected"), PUBLIC_ROWS)
def test_a_public_file_is_refused_and_converted(tmp_path, monkeypatch, name, public, expected):
    """Claim: under the published file's name it is refused with the command that converts it; that
    command makes the paper's form of it, once, and the tasks take it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw, new, task = tmp_path / "raw", tmp_path / "new", get_task(name)
    raw.mkdir()
    new.mkdir()
    file = raw / task.file
    file.write_text(json.dumps([public]))
    with pytest.raises(InputError, match=f"evaluation.download --data NEW_DIR --tasks {name} "):
        task.load(raw)
    download.convert(task, file, new)
    assert task.load(new) == [expected]
    with pytest.raises(InputError, match="exists already"):
        download.convert(task, file, new)
    with pytest.raises(InputError, match=r"row 0 is not as in the public file"):
        download.convert(task, new / task.file, tmp_path)


def test_public_files_come_packed_and_as_tables(tmp_path):
    """Claim: gzip and Hendrycks' CSV files, whose names have the subject, give the same rows."""
    (tmp_path / "new").mkdir()
    packed = tmp_path / "g.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(PUBLIC_ROWS[0][1]).encode()))
    download.convert(get_task("GSM8K"), packed, tmp_path / "new")
    assert get_task("GSM8K").load(tmp_path / "new") == [ASKED]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "optics_test.csv").write_text("Q,red,green,blue,grey,C\n")
    download.convert(get_task("MMLU"), tmp_path / "test", tmp_path / "new")
    assert get_task("MMLU").load(tmp_path / "new") == [PUBLIC_ROWS[-1][2]]
    with pytest.raises(InputError, match="--from goes with GSM8K, MATH-500, HumanEval"):
        download.convert(get_task("AIME-24"), packed, tmp_path / "new")


def test_evalplus_problems_choose_and_word_the_converted_rows(tmp_path, release):
    """Claim: where its file is in the data, its problems alone are kept, asked as it asks them."""
    (tmp_path / "MbppPlus.jsonl").write_text('{"task_id": "Mbpp/2", "prompt": "Do it."}')
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps([PUBLIC_ROWS[4][1], PUBLIC_ROWS[4][1] | {"task_id": 3}]))
    said = download.convert(get_task("MBPP"), raw, tmp_path)
    assert "1 rows of 2: those of EvalPlus' 1 problems" in said
    assert [row["question"] for row in get_task("MBPP").load(tmp_path)] == ["Do it."]
