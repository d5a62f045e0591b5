"""examples/smollm2 as far as it goes without a model: its recipes and the order of its stages."""

import json
from pathlib import Path

from examples.smollm2.run import RECIPE, WARM_UP, Settings, stages
from megatron_opdlm.config import load_config


def test_both_trainings_speak_of_the_same_student():
    """Claim: what the warm-up makes is what distillation goes on with: blocks, shift, type."""
    first, second = (load_config(path, []) for path in (WARM_UP, RECIPE))
    assert first.rollout.block_size == second.rollout.block_size
    assert first.loss.logit_shift == second.loss.logit_shift
    assert first.model.dtype == second.model.dtype
    assert first.mixing.fraction == 1 > second.mixing.fraction


def test_stages_in_order(tmp_path: Path):
    """Claim: a stage whose output is there is complete, the others are not; distillation goes on
    from the warm-up's last checkpoint, and keys reach both trainings."""
    settings = Settings(
        out=tmp_path, ranks=1, problems=2, max_new_tokens=8, overrides=["train.seed=7"]
    )
    for made in ("model", "imported"):
        (tmp_path / made).mkdir()
    (tmp_path / "warm_up.json").write_text(json.dumps({"checkpoint": "step_0000034"}))
    found = {stage.name: stage for stage in stages(settings)}
    done = [name for name, stage in found.items() if stage.complete()]
    assert done == ["fetch", "import", "warm_up"]
    order = list(found)
    assert order[:6] == ["fetch", "import", "answer", "warm_up", "distil", "export"]
    assert order[-1] == "report"
    command = found["distil"].command()
    assert f"model.path={tmp_path}/warm_up/checkpoints/step_0000034" in command
    assert f"teacher.path={tmp_path}/imported" in command
    for name in ("warm_up", "distil"):
        assert "train.seed=7" in found[name].command()
