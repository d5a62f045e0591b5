"""What a quickstart measured, read from the files that its stages wrote."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.jsonl import read_jsonl
from evaluation.report import read_summary
from megatron_opdlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Results:
    """One finished quickstart."""

    record: dict[str, Any]  # quickstart.json: seed, layout, seconds, the stop on the way
    metrics: list[dict[str, Any]]  # one training step each, in order
    evaluations: dict[str, dict[str, Any]]  # name -> summary row

    def accuracy(self, name: str) -> float:
        return self.evaluations[name]["accuracy"]

    def tokens_at(self, checkpoint: str) -> int:
        """Response tokens trained when ``step_NNNNNNN`` was saved (N steps done)."""
        done = int(checkpoint.removeprefix("step_"))
        return self.metrics[done - 1]["cumulative_trained_tokens"]

    @property
    def trained_tokens(self) -> int:
        return self.metrics[-1]["cumulative_trained_tokens"]

    def curve(self) -> list[tuple[int, float]]:
        """(trained tokens, accuracy at one token a pass), untrained to trained student."""
        between = [
            (self.tokens_at(name.removeprefix("curve_")), self.accuracy(name))
            for name in sorted(self.evaluations)
            if name.startswith("curve_")
        ]
        end = (self.trained_tokens, self.accuracy("static_1"))
        return [(0, self.accuracy("initial")), *between, end]

    def named(self, kind: str) -> dict[str, dict[str, Any]]:
        """The evaluations ``KIND_VALUE`` by their value, in order."""
        rows = {
            name.removeprefix(f"{kind}_"): row
            for name, row in self.evaluations.items()
            if name.startswith(f"{kind}_")
        }
        return dict(sorted(rows.items(), key=lambda item: float(item[0])))


def read_results(out: Path) -> Results:
    """Read a finished quickstart directory; InputError when a stage did not finish."""
    path = out / "quickstart.json"
    if not path.is_file():
        raise InputError(
            f"{out}: no finished quickstart (quickstart.json is missing); run it again"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    metrics = read_jsonl(out / "run" / "metrics.jsonl", "metrics")
    steps = [row["step"] for row in metrics]
    if steps != sorted(set(steps)):
        raise InputError(f"{out / 'run' / 'metrics.jsonl'}: steps repeat or go back; run it again")
    evaluations = {
        name: read_summary(out / "evaluation" / name / "summary.json")[0]
        for name in record["evaluated"]
    }
    return Results(record=record, metrics=metrics, evaluations=evaluations)


def report_json(results: Results) -> dict[str, Any]:
    """The contract's report.json (DESIGN 5)."""
    record = results.record
    return {
        "problems": results.evaluations["teacher"]["n"],
        "teacher_accuracy": results.accuracy("teacher"),
        "initial_student_accuracy": results.accuracy("initial"),
        "student_accuracy": results.accuracy("static_1"),
        "static": {k: row["accuracy"] for k, row in results.named("static").items()},
        "dynamic": {
            threshold: {
                "accuracy": row["accuracy"],
                "tokens_per_denoising_step": row["tokens_per_denoising_step"],
            }
            for threshold, row in results.named("dynamic").items()
        },
        "trained_tokens": results.trained_tokens,
        "seconds": {name: round(value, 1) for name, value in record["seconds"].items()},
        "seed": record["seed"],
        "logit_shift": results.evaluations["static_1"]["settings"]["logit_shift"],
        # Training was stopped at a checkpoint and the second start went on to a later one.
        "resumed": record["stopped_after"] < record["finished_at"],
    }
