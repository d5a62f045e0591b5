"""Prepared data: every row is what the model is asked, and what was left out is counted."""

import datetime
import decimal
import hashlib
import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evaluation import download
from evaluation.tasks import get_task
from megatron_opdlm import prepare_data
from megatron_opdlm.data.checks import EvaluationProblems, Identity, duplicates, words
from megatron_opdlm.data.dapo import dapo_rows
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.data.sources import TRAINING_SETS, ask, fetch
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.writing import write_jsonl
from tests.conftest import TinyModels

LONG = "a b c d e f g h i j k l m n o"


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prepared(models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command on rows; returns (rows written, manifest)."""
    model = models.hf("student", tied=True)

    def run(rows: list[object], *flags: str, name: str = "source.jsonl") -> tuple[list[dict], dict]:
        source, out = write(tmp_path / name, rows), tmp_path / "data" / "out.jsonl"
        argv = ["--source", str(source), "--tokenizer", str(model), "--out", str(out), *flags]
        monkeypatch.setattr("sys.argv", ["prepare_data", *argv])
        prepare_data.main()
        manifest = json.loads(prepare_data.manifest_of(out).read_text())
        assert manifest["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
        return [json.loads(line) for line in out.read_text().splitlines()], manifest

    return run


def test_questions_are_asked_as_their_domain_is():
    math = "Q{x}\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert ask("Q{x}", "math", "by_domain") == ask("Q{x}", None, "math") == math
    assert ask("Q{x}", None, "by_domain") == math  # as the reference asks a row without a domain
    assert ask("Q", "science", "by_domain").endswith('e.g., "answer": "C".')
    for domain in ("code", "chat", "poetry"):
        assert ask("Q", domain, "by_domain") == "Q"


def test_rows_that_do_not_belong_are_dropped_and_counted(prepared, tmp_path, capsys):
    """Claim: one row of each kind is found, for its reason; keys of kept rows are kept."""
    data = tmp_path / "benchmarks"
    data.mkdir()
    (data / "B.json").write_text(json.dumps([{"question": f"x {LONG} y"}]))
    rows = [
        {"prompt": "abc", "source": "s", "domain": "math"},
        {"prompt": "abc"},
        {"prompt": "A b c", "domain": "chat"},
        {"prompt": " a  B c"},
        {"prompt": f"z {LONG}"},
        {"prompt": "a " * 60},
    ]
    kept, manifest = prepared(rows, "--evaluation-data", str(data), "--max-prompt-tokens", "50")
    assert kept == [rows[0], rows[2]]
    assert manifest["dropped"] == {
        "faulty": 0,
        "too_long": 1,
        "repeated": 2,
        "in_evaluation_data": 1,
    }
    assert (manifest["repeated_exactly"], manifest["repeated_normalised"]) == (1, 1)
    assert manifest["overlap_by_file"] == {"B.json": 1}
    assert manifest["domains"] == {"math": 1, "chat": 1}
    assert "2 of 6" in capsys.readouterr().out


def test_a_faulty_row_is_named_by_its_line(prepared):
    rows = [{"prompt": "a"}, {"answer": "b"}, {"prompt": 3}]
    with pytest.raises(InputError, match=r"2 of 3 rows are faulty: .*line 2: .*line 3: "):
        prepared(rows)


def test_a_key_of_the_wrong_type_is_a_faulty_row(prepared):
    rows: list[object] = [{"prompt": "a"}, {"question": "b", "domain": ["math"]}]
    with pytest.raises(InputError, match=r"1 of 2 .*line 2: domain must be text, not list"):
        prepared(rows, "--template", "by_domain")
    kept, manifest = prepared(rows, "--template", "by_domain", "--drop-invalid")
    assert kept == rows[:1] and manifest["dropped"]["faulty"] == 1


def test_faulty_rows_can_be_dropped(prepared):
    kept, manifest = prepared([{"prompt": "a"}, {"answer": "b"}], "--drop-invalid")
    assert kept == [{"prompt": "a"}] and manifest["dropped"]["faulty"] == 1


def test_an_overlap_needs_that_many_words_in_a_row():
    """Claim: n words in a row, not n - 1; a shorter question only as a whole; letters of Chinese
    count as words."""
    problems = EvaluationProblems(13)
    problems.add("a", [LONG, "two words", "一二三四五六七八九十甲乙丙丁"])
    own = LONG.split()
    assert problems.file_of("q " + " ".join(own[1:14])) == "a"
    assert problems.file_of("q " + " ".join(own[1:13]) + " r") is None
    assert problems.file_of("Two WORDS.") == "a"
    assert problems.file_of("two words more") is None
    assert problems.file_of("问 二三四五六七八九十甲乙丙丁。") == "a"


def test_words_and_duplicates():
    assert words("\uff28ello,  x^2!") == ["hello", "x", "2"]
    texts = ["a b", "A  B\n", "a b", "a, b", "5-3", "5+3", "x^2-4=0", "x^2+4=0", "3<4", "3>4"]
    rows: list[dict] = [{"prompt": text} for text in texts]
    rows += [{"prompt_ids": [1]}, {"prompt_ids": [1]}, {"prompt_ids": [2]}]
    assert duplicates([Identity.of(row) for row in rows]) == ([2, 11], [1])


def test_repetitions_agree_in_every_turn_and_in_the_response():
    """Claim: one change anywhere in what is asked or answered makes another row; a question is the
    conversation that it is rendered as."""

    def turns(*contents: str) -> dict:
        roles = ["user", "assistant", "user"][: len(contents)]
        pairs = zip(roles, contents, strict=True)
        return {"messages": [{"role": role, "content": content} for role, content in pairs]}

    rows = [
        {"question": "Q", "response": "a"},
        {"question": "Q", "response": "b"},
        {"question": "Q"},
        {"question": "Q", "system": "be brief"},
        {"question": "Q", "system": "be long"},
        turns("Q"),
        turns("Q", "A", "R"),
        turns("Q", "B", "R"),
        {"prompt": "Q"},
        {"question": "q", "response": "b"},
        {"question": "q", "response": "B"},
    ]
    assert duplicates([Identity.of(row) for row in rows]) == ([5], [9])


def test_training_sets_among_the_evaluation_data_are_not_compared(prepared, tmp_path, capsys):
    """Claim: neither the source itself, whatever its name, nor a published or prepared training
    set beside the benchmarks takes rows away; a benchmark still does."""
    data = tmp_path / "all"
    data.mkdir()
    rows: list[object] = [{"prompt": f"{LONG} {n}"} for n in "pqr"]
    write(data / "copy.jsonl", rows)
    write(data / "opdlm_train.json", [*rows, {"prompt": "more"}])
    write(data / "mine.jsonl", [*rows, {"prompt": "other"}])
    (data / "mine.jsonl.manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"nothing but training sets \(copy\.jsonl, mine\.jsonl, "):
        prepared(rows, "--evaluation-data", str(data))
    write(data / "B.jsonl", [{"question": f"{LONG} q"}])
    rows.append({"prompt": "of its own"})
    write(data / "copy.jsonl", rows)
    kept, manifest = prepared(rows, "--evaluation-data", str(data), "--keep-overlap")
    assert kept == rows
    assert manifest["overlap_by_file"] == {"B.jsonl": 3}
    assert manifest["not_compared"] == ["copy.jsonl", "mine.jsonl", "opdlm_train.json"]
    assert "training sets: copy.jsonl, mine.jsonl, opdlm_train.json" in capsys.readouterr().out


def test_the_training_sets_that_evaluation_knows_are_known():
    from evaluation.tasks import training_probes

    probes = [kind for kind in vars(training_probes).values() if isinstance(kind, type)]
    files = {kind.file for kind in probes if kind.__module__ == training_probes.__name__}
    assert {Path(file).stem for file in files} == TRAINING_SETS - {
        *("math_train", "dapo", "dapo-math-17k"),  # their names elsewhere
    }


def test_a_local_file_of_a_published_set_is_asked_as_that_set_is(prepared, capsys):
    """Claim: by its file's name; --template decides otherwise; the output says which."""
    rows: list[object] = [{"question": "1+2", "domain": "math"}]
    kept, manifest = prepared(rows, name="opdlm_train.json")
    assert kept[0]["question"] == ask("1+2", "math", "math")
    assert manifest["template"] == "by_domain"
    assert "by_domain: that of the published opdlm_train.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("mine.jsonl", (), "none: no published set's name"),
        ("opdlm_train.json", ("--template", "none"), "none: as --template says"),
    ],
)
def test_other_files_are_asked_as_they_are(prepared, capsys, name, flags, said):
    rows: list[object] = [{"question": "1+2", "domain": "math"}]
    assert prepared(rows, *flags, name=name)[0] == rows
    assert f"template       {said}" in capsys.readouterr().out


def test_an_unknown_set_and_no_network(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'opdlm_train'"):
        fetch("opdlm_trian")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"opdlm_train\.json of divelab/opdlm_train_data cannot be"):
        fetch("opdlm_train", cache=tmp_path)


def dapo_file(path: Path, contents: list[str]) -> Path:
    """A Parquet file in the form of DAPO-Math-17k."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": content, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(number)},
        }
        for number, content in enumerate(contents)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{}\n\nRemember to put your answer on its own line after "Answer:".'
)


def test_dapo_is_asked_once_and_as_mathematics_is(models, tmp_path, monkeypatch):
    """Claim: the published file's repeats and instructions go, the paragraphs of a problem stay;
    training and evaluation read the same questions."""
    problems = ["Find x.", "Given:\n\ny = 2\n\nFind y."]
    texts = [DAPO.format(problems[i]) for i in (0, 1, 0, 0, 1)]
    source = dapo_file(tmp_path / "dapo-math-17k.parquet", texts)
    out, model = tmp_path / "out.jsonl", models.hf("student", tied=True)
    argv = ["--source", str(source), "--tokenizer", str(model), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["prepare_data", *argv])
    prepare_data.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in rows] == [ask(p, None, "math") for p in problems]
    assert {row["ground_truth_answer"] for row in rows} == {"34"}
    download.convert(get_task("DAPO_Math_17k"), source, tmp_path)
    asked = [row["question"] for row in get_task("DAPO_Math_17k").load(tmp_path)]
    assert asked == problems
    other = dapo_file(tmp_path / "other.parquet", ["Find x. The answer is a number."])
    with pytest.raises(InputError, match=r"row 1: 'prompt' is not a problem between"):
        dapo_rows(other, "--source")
    with pytest.raises(RunError, match=r"data/dapo-math-17k\.parquet of BytedTsinghua-SIA"):
        monkeypatch.setattr("huggingface_hub.hf_hub_download", _refuse)
        fetch("dapo")


def _refuse(*_: object, **__: object) -> None:
    raise OSError("no route")


def test_columns_that_json_has_no_form_of_are_written_as_text(
    models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Claim: they are carried along, nested ones too; NaN is null; training reads the file."""
    fields = {
        "question": "1+2",
        "day": datetime.date(2026, 1, 2),
        "at": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "exact": pyarrow.scalar(1_700_000_000_123_456_789, pyarrow.timestamp("ns", "UTC")),
        "took": datetime.timedelta(seconds=90),
        "price": decimal.Decimal("1.50"),
        "thumb": b"\xff\x00",
        "inner": {"days": [datetime.date(2026, 1, 2)], "odd": math.nan},
        "odd": math.inf,
    }
    source, out = tmp_path / "rows.parquet", tmp_path / "data" / "out.jsonl"
    columns = {name: pyarrow.array([value]) for name, value in fields.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), source)
    model = models.hf("student", tied=True)
    argv = ["--source", str(source), "--tokenizer", str(model), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["prepare_data", *argv])
    prepare_data.main()
    assert sorted(path.name for path in out.parent.iterdir()) == [
        out.name,
        f"{out.name}.manifest.json",
    ]
    (row,) = read_rows(out, "data.path")
    assert row.fields == {
        "question": "1+2",
        "day": "2026-01-02",
        "at": "2026-01-02 03:04:05",
        "exact": "2023-11-14 22:13:20.123456789+00:00",
        "took": "0:01:30",
        "price": "1.50",
        "thumb": "b'\\xff\\x00'",
        "inner": {"days": ["2026-01-02"], "odd": None},
    }


def test_a_column_that_cannot_be_read_is_refused_in_a_line(tmp_path):
    """Claim: a time that no Python date can be is named, not a traceback."""
    path = tmp_path / "rows.parquet"
    late = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"question": ["1"], "late": late}), path)
    with pytest.raises(InputError, match=r"rows\.parquet: column late .*; leave it out"):
        read_rows(path, "--source")


def test_no_temporary_file_is_left_where_writing_fails(tmp_path):
    """Claim: a value that cannot even be shown ends the write with nothing half-written."""

    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_jsonl(tmp_path / "out.jsonl", [{"a": 1}, {"a": Unspeakable()}])
    assert not list(tmp_path.iterdir())
