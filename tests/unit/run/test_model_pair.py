"""Student and teacher are opened as a pair that speaks the same tokens; only one has a mask."""

from pathlib import Path

import pytest

from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.run import build
from tests.conftest import MASK, VOCABULARY, TinyModels
from tests.tiny_models import edit_json, make_qwen3

REGISTERED = 49  # what follows the tokenizer's last token


def opened(student: Path, teacher: Path):
    """Vocabulary of the student, and the teacher's directory."""
    config = load_config(None, [f"model.path={student}", f"teacher.path={teacher}"])
    pair = build.open_pair(config, world_size=1)
    return pair[0].vocabulary, pair[1].directory


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose tokenizer has a mask token."""
    where = tmp_path_factory.mktemp("registered")
    return make_qwen3(where, tied=True, seed=3, vocab=VOCABULARY, layers=1, mask_token="<|MASK|>")


def test_a_teacher_needs_no_mask_token(models: TinyModels, registered: Path):
    """Claim: an autoregressive model whose vocabulary has no room for 151669 teaches a
    student whose mask token its tokenizer, or its checkpoint, knows."""
    teacher = models.hf("teacher", tied=True)
    vocabulary, directory = opened(registered, teacher)
    assert (vocabulary.mask_id, directory) == (REGISTERED, teacher)
    assert opened(models.imported("student", tied=True), teacher)[0].mask_id == MASK


def test_a_teacher_s_own_mask_token_is_not_asked_about(
    models: TinyModels, registered: Path, tmp_path: Path
):
    """Claim: the id that a teacher was made with may be another, since it never reads it."""
    teacher = make_qwen3(tmp_path, tied=True, seed=4, vocab=VOCABULARY, layers=1)
    edit_json(teacher / "config.json", mask_token_id=MASK + 1)
    assert opened(registered, teacher)[0].mask_id == REGISTERED


def test_a_student_still_needs_one(models: TinyModels):
    with pytest.raises(InputError, match=r"no room for the usual mask token 151669"):
        opened(models.hf("student", tied=True), models.hf("teacher", tied=True))
