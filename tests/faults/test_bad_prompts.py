"""Prompts that a good command cannot render or hold: refused by their place, nothing written. (Rows
that are wrong without any model: test_bad_command_lines.py.)
"""

import shutil
from pathlib import Path

import pytest

from tests.conftest import MASK, TinyModels
from tests.faults.refusals import Runner
from tests.faults.spoiling import Spoil, config, no_template, no_tokenizer, template


@pytest.fixture
def model(models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models.hf("student", tied=True, layers=2), tmp_path / "model"))


QUESTION = '{"question": "1+1="}'
# What is done to the model, a row of prompts -> what evaluation.sample says of the row.
PROMPTS: dict[str, tuple[Spoil, str, tuple[str, ...]]] = {
    "no template": (no_template, QUESTION, ("row 0", "no chat template", "give prompt_ids")),
    "template that raises": (
        template("{{ raise_exception('roles must alternate') }}"),
        QUESTION,
        ("row 0", "roles must alternate", "change"),
    ),
    "template that divides by zero": (template("{{ 1 // 0 }}"), QUESTION, ("row 0", "change")),
    "template that adds text and number": (
        template("{{ 'a' + 1 }}"),
        QUESTION,
        ("row 0", "change"),
    ),
    "template that is none": (template("{% for %}"), QUESTION, ("row 0", "template")),
    "template that says nothing": (template(" {#- #}"), QUESTION, ("row 0", "no tokens")),
    "no tokenizer": (no_tokenizer, QUESTION, ("row 0", "no tokenizer", "give prompt_ids")),
    "longer than the model": (
        config(max_position_embeddings=4),
        '{"prompt_ids": [1, 2, 3, 4]}',
        ("4", "positions", "shorten|shorter"),
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(runner: Runner, model: Path, tmp_path: Path, case: str) -> None:
    spoil, row, patterns = PROMPTS[case]
    spoil(model)
    (tmp_path / "rows.jsonl").write_text(row)
    arguments = ["--model", model, "--prompts", tmp_path / "rows.jsonl"]
    arguments += ["--out", tmp_path / "out.jsonl", "--mask-token-id", MASK]
    runner.refuses(tmp_path, "sample", *arguments, patterns=patterns)
