"""``import megatron_opdlm as opdlm``: what the notebook shows and docs/python.md says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_opdlm as opdlm
from megatron_opdlm import replay
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError
from tests.conftest import MASK, TinyModels

ROOT = Path(__file__).parents[2]


def test_the_package_waits_for_no_torch():
    """Claim: importing the package imports no PyTorch, though it offers ``load``."""
    code = "import sys, megatron_opdlm; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        opdlm.lode  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_scores_are_replays(models: TinyModels, tmp_path: Path):
    """Claim: ``score`` gives what the command ``replay`` computes of the same states, and the model
    generates the same before and after."""
    student, teacher = models.hf("student", tied=True), models.hf("teacher", tied=True)
    model = opdlm.load(student, mask_token_id=MASK)
    before = model.generate([[1, 2, 3]], max_new_tokens=9, temperature=1.0, seed=4)
    states = [
        {"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7, 8], "masked": [0, 1, 1, 0, 1]},
        {"prompt_ids": [9], "response_ids": [5, 6, 7], "masked": [1, 0, 1]},
    ]
    scored = model.score(states, teacher=teacher)
    file = tmp_path / "states.jsonl"
    file.write_text("".join(json.dumps(state) + "\n" for state in states))
    keys = [f"model.path={student}", f"teacher.path={teacher}", f"model.mask_token_id={MASK}"]
    assert scored == replay.replay(load_config(None, keys), file)
    assert scored["loss"] > 0 and len(scored["per_sequence"]) == 2
    assert model.generate([[1, 2, 3]], max_new_tokens=9, temperature=1.0, seed=4) == before
    with pytest.raises(InputError, match="state 0: masked has 1 entries"):
        model.score([states[0] | {"masked": [1]}])
    with pytest.raises(InputError, match="did you mean 'block_size'"):
        model.generate([[1]], blocksize=4)


def test_the_notebook_runs(models: TinyModels, monkeypatch: pytest.MonkeyPatch):
    """Claim: its code cells, in order, run on any model with a chat template; none holds output."""
    monkeypatch.setenv("MODEL", str(models.imported("teacher", tied=True)))
    cells = json.loads((ROOT / "examples" / "first_look.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), names)
    assert names["scored"]["loss_tokens"] > 0  # pyright: ignore[reportIndexIssue]
