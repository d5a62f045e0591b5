"""The golden loss curve of ``configs/tiny_cpu.yaml``: its first steps from fixed tiny weights.

    python -m tests.golden.tiny_cpu        # records tests/golden/tiny_cpu.json anew

Record anew only with a change that is meant to change the numbers, and say so in the commit.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm import train
from megatron_opdlm.config import load_config
from tests.conftest import LAST_TOKEN, MASK, VOCABULARY
from tests.tiny_models import make_qwen3

RECIPE = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
CURVE = Path(__file__).with_suffix(".json")
STEPS = 8
COUNTED = ("step", "max_new_tokens", "updates", "rollout_tokens", "trained_tokens", "loss_tokens")
COMPUTED = ("loss", "kl", "grad_norm", "lr")


def make_curve(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in ``folder``, with the recipe's every key but the number of steps; one row a step."""
    model = make_qwen3(folder / "model", tied=True, seed=21, vocab=VOCABULARY, layers=2)
    prompts = folder / "prompts.jsonl"
    generator = torch.Generator().manual_seed(22)
    rows = [
        torch.randint(LAST_TOKEN - 2, (3 + i % 6,), generator=generator).tolist()
        for i in range(500)
    ]
    prompts.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
    out = folder / "run"
    paths = [f"model.path={model}", f"data.path={prompts}", f"train.out={out}"]
    short = [f"train.steps={STEPS}", f"model.mask_token_id={MASK}", "logging.tensorboard=false"]
    train.run(load_config(RECIPE, [*paths, *short, *overrides]))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in (*COUNTED, *COMPUTED)} for row in rows]


def read_curve() -> list[dict[str, Any]]:
    """The recorded curve."""
    return json.loads(CURVE.read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = make_curve(Path(folder))
    CURVE.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
    print(f"{CURVE.name}: {len(rows)} steps, loss {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}")


if __name__ == "__main__":
    main()
