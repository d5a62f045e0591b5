"""Evaluate many (model, decoding) pairs in one process group: starting costs more than running.

    torchrun ... -m launch.quickstart.evaluate --plan PLAN.json

The plan: ``{"task", "data", "out", "evaluations": [{"name", "model", "decoding": {...}}, ...]}``.
Every entry gets the directory OUT/NAME with the files of ``evaluation.run``; consecutive entries of
one model load it once.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import Loading
from evaluation.run import evaluate, load_tasks, write_results
from evaluation.sample import open_generator
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command


def read_plan(path: Path) -> dict[str, Any]:
    """The plan with validated ``Decoding`` records; InputError when it cannot be read."""
    if not path.is_file():
        raise InputError(f"--plan {path}: no such file; the quickstart writes it")
    plan = json.loads(path.read_text(encoding="utf-8"))
    for entry in plan["evaluations"]:
        entry["decoding"] = Decoding(**entry["decoding"]).validate()
    return plan


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--plan", required=True, type=Path, metavar="PLAN.json")
    plan = read_plan(parser.parse_args().plan)
    tasks = load_tasks([plan["task"]], Path(plan["data"]), None)
    loaded, generator = None, None
    for entry in plan["evaluations"]:
        if entry["model"] != loaded:
            loaded, generator = entry["model"], open_generator(Path(entry["model"]), Loading())
        assert generator is not None
        settings = {"model": entry["model"], **asdict(Loading())}
        summaries, predictions = evaluate(generator, tasks, entry["decoding"], 1, settings)
        if generator.is_writer:
            write_results(Path(plan["out"]) / entry["name"], summaries, predictions)
            print(f"{entry['name']}: {summaries[0]['accuracy']:.1%}", flush=True)


if __name__ == "__main__":
    command(main)
